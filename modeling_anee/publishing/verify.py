"""Loading an artifact from the Hub as a stranger would: a fresh process, an empty cache, no modeling-anee installed."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import get_token

from .export import composed


STRANGER = Path(__file__).with_name("stranger.py")  # run as a file, since the package must not be imported
CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE")


@dataclass(frozen=True)
class Check:
    """What to load and how to try it.

    Args:
        repository: `USER/REPO`.
        revision: commit, tag or branch; None for main.
        base: folder or Hub name to load the base from instead of its own name.
        budgets: energy budgets to generate and score at.
        prompt: what to continue.
        new_tokens: how many tokens to generate.
        tolerance: largest difference of logits to the local artifact.
    """

    repository: str
    revision: str | None = None
    base: str | None = None
    budgets: tuple[float, ...] = (1.0, 0.8, 0.5)
    prompt: str = "The lighthouse keeper"
    new_tokens: int = 12
    tolerance: float = 1e-4


def verify(check: Check, against: Path | None = None, token: str | None = None) -> bool:
    """Load and try an artifact of the Hub in a fresh process, which prints what it sees; whether all was right.

    Args:
        check: what to load and how to try it.
        against: local artifact, with code or without, that must give the same.
        token: for the Hub; None for the stored login.

    Raises:
        OSError, ValueError: `against` is not an artifact.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anee_verify_")))
        local = None if against is None else str(stack.enter_context(composed(against)))
        base = os.path.abspath(check.base) if check.base and os.path.isdir(check.base) else check.base
        wanted = asdict(check) | {"base": base, "against": local}
        command = [sys.executable, "-I", str(STRANGER.resolve()), json.dumps(wanted)]
        return subprocess.run(command, cwd=folder, env=clean_environment(folder, token), check=False).returncode == 0


def clean_environment(folder: Path, token: str | None) -> dict[str, str]:
    """The environment with all caches in an empty folder; a stored login is handed on."""
    found = {name: value for name, value in os.environ.items() if name not in CACHES}
    found |= {"HF_HOME": str(folder / "hf"), "ANEE_CACHE": str(folder / "anee"), "TOKENIZERS_PARALLELISM": "false"}
    login = token or get_token()
    return found | ({"HF_TOKEN": login} if login else {})
