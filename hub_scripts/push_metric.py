"""Publish a metric of `evaluate` as a Space: list what would go, and with `--no-dry-run` send it in one commit.

    python hub_scripts/push_metric.py USER/anee_perplexity                  # lists, sends nothing
    python hub_scripts/push_metric.py USER/anee_perplexity --no-dry-run     # then: evaluate.load("USER/anee_perplexity")

The name of the Space must be that of the metric's module, since `evaluate.load` looks for it there.
"""

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import HfApi

from modeling_anee.cli.guard import guarded
from modeling_anee.publishing.metric import METRIC, SDK, problems
from modeling_anee.publishing.names import check_revision
from modeling_anee.publishing.plan import PlannedFile, as_text, entries, hidden, refuse
from modeling_anee.publishing.push import Target, publish


def main(
    repository: Annotated[str, typer.Argument(metavar="USER/SPACE", help="Where to; made if it does not exist.")],
    metric: Annotated[Path, typer.Argument(help="Folder of the metric.")] = METRIC,
    revision_tag: Annotated[str | None, typer.Option(help="Tag for the commit, such as v1.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="The Space must be private.")] = False,
    dry_run: Annotated[bool, typer.Option(help="List what would go; no request is made.")] = True,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Publish this file although it looks like a secret; repeatable.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Token; better: HF_TOKEN or `hf auth login`.")] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload metric",
) -> None:
    """Publish a metric on the Hub."""
    target = Target(HfApi(token=token), repository, "space", SDK, private=private or None)
    check_revision("--revision-tag", revision_tag)
    refuse(metric, problems(metric, repository, allow or ()))
    files = [PlannedFile.read(path) for path in entries(metric)]
    print(as_text(files, hidden(metric)))
    if dry_run:
        print(f"\nThis is a dry run: nothing was sent to the Space {repository}. To publish: --no-dry-run")
        return
    commit = publish(target, files, message, revision_tag)
    print(f"published: {target.url} at {commit}")


if __name__ == "__main__":
    typer.run(guarded(main))
