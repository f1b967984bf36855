"""A compute dial for any pretrained causal LM; importing it registers the classes with transformers."""

from .actions import Action, ActionTable
from .configuration_anee import AneeConfig
from .modeling_anee import AneeForCausalLM, AneeModel, register
from .trace import ExecutionTrace
from .version import __version__


__all__ = ["Action", "ActionTable", "AneeConfig", "AneeForCausalLM", "AneeModel", "ExecutionTrace", "__version__"]

register()
