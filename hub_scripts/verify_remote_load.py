"""Load an artifact from the Hub as a stranger would: a fresh process, an empty cache, no modeling-anee installed.

    python hub_scripts/verify_remote_load.py USER/REPO --revision v1.0 --against ARTIFACT --base FOLDER

The exit code is 1 if it can't be loaded, or if its logits or tokens are not those of the local artifact. The base comes
from `--base`, from the folders in ANEE_BASE_PATH, or from the Hub.
"""

from pathlib import Path
from typing import Annotated

import typer

from modeling_anee.cli.guard import guarded
from modeling_anee.cli.perplexity import parse_budgets
from modeling_anee.publishing.names import check_repository, check_revision
from modeling_anee.publishing.verify import Check, verify


def main(
    repository: Annotated[str, typer.Argument(metavar="USER/REPO", help="The artifact on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch. Default: main.")] = None,
    against: Annotated[Path | None, typer.Option(help="Local artifact folder to compare with.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder or Hub name to load the base from instead of its own name.")] = None,
    budgets: Annotated[str, typer.Option(help="Energy budgets; 1.0 is always among them.")] = "1.0,0.8,0.5",
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "The lighthouse keeper",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 12,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference of logits.")] = 1e-4,
    token: Annotated[str | None, typer.Option(help="Token; better: HF_TOKEN or `hf auth login`.")] = None,
) -> None:
    """Check that an artifact on the Hub loads, runs and is the same as the local one."""
    check_repository(repository)
    check_revision("--revision", revision)
    check = Check(repository, revision, base, tuple(parse_budgets(budgets)), prompt, new_tokens, tolerance)
    if not verify(check, against, token):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(guarded(main))
