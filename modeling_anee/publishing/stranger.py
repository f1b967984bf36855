"""What `verify.py` runs in a fresh process, as a file: it imports nothing of this package, which must not be there."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


PACKAGE = "modeling_anee"


def main(wanted: dict[str, Any]) -> int:
    """Load, run, compare, print; returns the exit code. `wanted` has the fields of `verify.Check`, and `against`."""
    hide_package()
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    name, revision = wanted["repository"], wanted["revision"]
    try:
        model = load(name, wanted["base"], revision)
        check_origin(model)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True)
        print(f"loaded {name}, code from {type(model).__module__}")
        print(f"base {wanted['base'] or model.config.base_model_name_or_path}")
        ids = tokenizer(wanted["prompt"], return_tensors="pt").input_ids
        other = None if wanted["against"] is None else load(wanted["against"], wanted["base"], None)
        wrong = [reason for budget in wanted["budgets"] for reason in run(model, other, tokenizer, ids, budget, wanted)]
    except (OSError, ValueError, ImportError) as error:
        wrong = [str(error)]
    for reason in wrong:
        print(f"error: {reason}", file=sys.stderr)
    if not wrong:
        print("the same as the local artifact" if wanted["against"] else "it loads and runs; there was nothing to compare with")
    return int(bool(wrong))


def hide_package() -> None:
    """Make sure that the code of the artifact runs, and not an installed package.

    Raises:
        ImportError: the package can be imported all the same.
    """
    sys.modules[PACKAGE] = None  # type: ignore[assignment]  # what Python takes as: not to be found
    try:
        importlib.import_module(PACKAGE)
    except ImportError:
        print(f"{PACKAGE} can't be imported here; caches are empty")
    else:
        raise ImportError(f"{PACKAGE} can be imported, so this would not test the code on the Hub")


def load(name: str, base: str | None, revision: str | None) -> Any:
    """A model with the code that comes with it."""
    from transformers import AutoModelForCausalLM

    options = {"base_model_name_or_path": base} if base else {}
    return AutoModelForCausalLM.from_pretrained(
        name, revision=revision, trust_remote_code=True, dtype="float32", **options
    ).eval()


def check_origin(model: Any) -> None:
    """The class is that of the downloaded files.

    Raises:
        ImportError: it is another.
    """
    file = Path(sys.modules[type(model).__module__].__file__ or "").resolve()
    if not file.is_relative_to(Path(os.environ["HF_HOME"]).resolve()):
        raise ImportError(f"the code that runs is {file}, which was not downloaded")


def run(model: Any, other: Any, tokenizer: Any, ids: Any, budget: float, wanted: dict[str, Any]) -> list[str]:
    """Generate and score at a budget, print what was seen; returns what differs from the local artifact."""
    import torch

    options = {"energy_budget": budget, "max_new_tokens": wanted["new_tokens"], "do_sample": False}
    mask = torch.ones_like(ids)
    with torch.no_grad():
        output = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
        logits = model(output.sequences, energy_budget=budget).logits
        text = tokenizer.decode(output.sequences[0, ids.shape[1] :])
        line = f"budget {budget:g}: cost {output.execution.mean_cost:.3f}, {text!r}"
        if other is None:
            print(line)
            return []
        difference = float((logits - other(output.sequences, energy_budget=budget).logits).abs().max())
        tokens = other.generate(ids, attention_mask=mask, **options)
    print(f"{line}, logits differ by at most {difference:.2g}")
    found = [] if difference <= wanted["tolerance"] else [f"at budget {budget:g} logits differ by {difference:.3g}"]
    return found if torch.equal(tokens, output.sequences) else [*found, f"at budget {budget:g} other tokens are generated"]


if __name__ == "__main__":
    raise SystemExit(main(json.loads(sys.argv[1])))
