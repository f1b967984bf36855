"""Publish an artifact: check the folder, list what would go, and with `--no-dry-run` send it in one commit.

    python hub_scripts/push_artifact.py ARTIFACT USER/REPO                                      # lists, sends nothing
    python hub_scripts/push_artifact.py ARTIFACT USER/REPO --revision-tag v1.0 --no-dry-run     # publishes

What goes is what `anee export ARTIFACT FOLDER` writes: the artifact with the code of this package.
Needs a token with write access: `hf auth login`, or HF_TOKEN. HF_ENDPOINT chooses another Hub; HF_HUB_DISABLE_XET=1 is for
one that does not speak Xet.
"""

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import HfApi

from modeling_anee.cli.guard import guarded
from modeling_anee.publishing.artifact import problems
from modeling_anee.publishing.export import composed
from modeling_anee.publishing.names import check_revision
from modeling_anee.publishing.plan import PlannedFile, as_text, entries, hidden, refuse
from modeling_anee.publishing.push import Target, publish


def main(
    artifact: Annotated[Path, typer.Argument(help="Folder of the artifact, with its code or without.")],
    repository: Annotated[str, typer.Argument(metavar="USER/REPO", help="Where to; made if it does not exist.")],
    revision_tag: Annotated[str | None, typer.Option(help="Tag for the commit, such as v1.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="The repository must be private.")] = False,
    dry_run: Annotated[bool, typer.Option(help="List what would go; no request is made.")] = True,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Publish this file although it looks like a secret; repeatable.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Token; better: HF_TOKEN or `hf auth login`.")] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload artifact",
) -> None:
    """Publish an artifact on the Hub."""
    target = Target(HfApi(token=token), repository, private=private or None)
    check_revision("--revision-tag", revision_tag)
    refuse(artifact, problems(artifact, allow or ()))
    with composed(artifact) as folder:
        files = [PlannedFile.read(path) for path in entries(folder)]
        print(as_text(files, hidden(artifact)))
        if dry_run:
            print(f"\nThis is a dry run: nothing was sent to {repository}. To publish: --no-dry-run")
            return
        commit = publish(target, files, message, revision_tag)
    print(f"published: {target.url}/tree/{revision_tag or commit}")
    print(f"AutoModelForCausalLM.from_pretrained({repository!r}, revision={revision_tag or commit!r}, trust_remote_code=True)")


if __name__ == "__main__":
    typer.run(guarded(main))
