"""Load an artifact from the Hub as a stranger would: a fresh process, an empty cache, no modeling-anee installed.

    python hub_scripts/verify_remote_load.py USER/REPO --revision v1.0 --against ARTIFACT --base FOLDER

The exit code is 1 if it can't be loaded, or if its logits or tokens are not those of the local artifact. The base comes
from `--base`, from the folders in ANEE_BASE_PATH, or from the Hub.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer


PACKAGE = "modeling_anee"
CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE")
INSIDE = "--inside"  # first argument of the fresh process


def main(
    repository: Annotated[str, typer.Argument(metavar="USER/REPO", help="The artifact on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch. Default: main.")] = None,
    against: Annotated[Path | None, typer.Option(help="Local artifact folder to compare with.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder or Hub name to load the base from instead of its own name.")] = None,
    budgets: Annotated[str, typer.Option(help="Energy budgets.")] = "1.0,0.8,0.5",
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "The lighthouse keeper",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 12,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference of logits.")] = 1e-4,
    token: Annotated[str | None, typer.Option(help="Token; better: HF_TOKEN or `hf auth login`.")] = None,
) -> None:
    """Check that an artifact on the Hub loads, runs and is the same as the local one."""
    wanted = {
        "repository": repository,
        "revision": revision,
        "against": None if against is None else str(against.resolve()),
        "base": os.path.abspath(base) if base and os.path.isdir(base) else base,
        "budgets": [float(budget) for budget in budgets.split(",")],
        "prompt": prompt,
        "new_tokens": new_tokens,
        "tolerance": tolerance,
    }
    with tempfile.TemporaryDirectory(prefix="anee_verify_") as folder:
        command = [sys.executable, "-I", str(Path(__file__).resolve()), INSIDE, json.dumps(wanted)]
        done = subprocess.run(command, cwd=folder, env=clean_environment(Path(folder), token), check=False)
    raise typer.Exit(done.returncode)


def clean_environment(folder: Path, token: str | None) -> dict[str, str]:
    """The environment with all caches in an empty folder; a stored login is handed on."""
    from huggingface_hub import get_token

    found = {name: value for name, value in os.environ.items() if name not in CACHES}
    found |= {"HF_HOME": str(folder / "hf"), "ANEE_CACHE": str(folder / "anee"), "TOKENIZERS_PARALLELISM": "false"}
    login = token or get_token()
    return found | ({"HF_TOKEN": login} if login else {})


def inside(wanted: dict[str, Any]) -> int:
    """The fresh process: load, run, compare, print; returns the exit code."""
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
    if sys.argv[1:2] == [INSIDE]:
        raise SystemExit(inside(json.loads(sys.argv[2])))
    typer.run(main)
