"""A compute dial for any pretrained causal LM; importing it registers the classes with transformers."""

from .actions import Action, ActionTable
from .budget_sources import BudgetSource, Deadline, Joules, Progress, TokensPerSecond
from .configuration_anee import AneeConfig
from .modeling_anee import AneeForCausalLM, AneeModel, register
from .resources import Battery, SystemLoad
from .sequence_classification import AneeForSequenceClassification, register_classifier
from .trace import ExecutionTrace
from .version import __version__


__all__ = [
    "Action",
    "ActionTable",
    "AneeConfig",
    "AneeForCausalLM",
    "AneeForSequenceClassification",
    "AneeModel",
    "Battery",
    "BudgetSource",
    "Deadline",
    "ExecutionTrace",
    "Joules",
    "Progress",
    "SystemLoad",
    "TokensPerSecond",
    "__version__",
]

register()
register_classifier()
