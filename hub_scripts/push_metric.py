"""Publish a metric of `evaluate` as a Space: list what would go, and with `--no-dry-run` send it in one commit.

    python hub_scripts/push_metric.py USER/anee_perplexity                  # lists, sends nothing
    python hub_scripts/push_metric.py USER/anee_perplexity --no-dry-run     # then: evaluate.load("USER/anee_perplexity")

The name of the Space must be that of the metric's module, since `evaluate.load` looks for it there.
"""

import ast
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from huggingface_hub import HfApi
from publishing import PlannedFile, PublishError, Target, as_text, entries, fail, publish


METRIC = Path(__file__).parent.parent / "modeling_anee" / "evaluation" / "anee_perplexity"
SDK = "gradio"
REQUIRED = ("README.md", "requirements.txt", "app.py")
ENDINGS = (".py", ".md", ".txt", ".json")


def problems(folder: Path, name: str) -> list[str]:
    """Why a folder should not be published as a metric of that name; empty if it should."""
    module = f"{name.rsplit('/', 1)[-1]}.py"
    found = [f"{needed} is missing" for needed in (module, *REQUIRED) if not (folder / needed).is_file()]
    files, _ = entries(folder)
    found += [f"{path.name} is not a file of a metric" for path in files if path.is_dir() or path.suffix not in ENDINGS]
    return found or check_front_matter(folder / "README.md") + check_code([path for path in files if path.suffix == ".py"])


def check_front_matter(card: Path) -> list[str]:
    """The Hub is told what kind of Space it is."""
    parts = card.read_text(encoding="utf-8").split("---\n")
    try:
        fields: Any = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else None
    except yaml.YAMLError as error:
        return [f"the front matter of README.md is not YAML: {error}"]
    if not isinstance(fields, dict) or fields.get("sdk") != SDK or "title" not in fields:
        return [f"the front matter of README.md must have a title and sdk: {SDK}"]
    return []


def check_code(files: list[Path]) -> list[str]:
    """The code can be parsed, and needs nothing beside what is in the folder and its requirements."""
    found = []
    for path in files:
        try:
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        except SyntaxError as error:
            found.append(f"{path.name} is not Python: {error}")
            continue
        if any(isinstance(node, ast.ImportFrom) and node.level > 1 for node in nodes):
            found.append(f"{path.name} imports from outside of its folder, which is not published")
    return found


def main(
    repository: Annotated[str, typer.Argument(metavar="USER/SPACE", help="Where to; made if it does not exist.")],
    metric: Annotated[Path, typer.Argument(help="Folder of the metric.")] = METRIC,
    revision_tag: Annotated[str | None, typer.Option(help="Tag for the commit, such as v1.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="The Space must be private.")] = False,
    dry_run: Annotated[bool, typer.Option(help="List what would go; no request is made.")] = True,
    token: Annotated[str | None, typer.Option(help="Token; better: HF_TOKEN or `hf auth login`.")] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload metric",
) -> None:
    """Publish a metric on the Hub."""
    if not metric.is_dir():
        raise typer.Exit(fail(f"{metric} is not a folder"))
    if found := problems(metric, repository):
        raise typer.Exit(fail(*found))
    kept, left_out = entries(metric)
    files = [PlannedFile.read(path) for path in kept]
    print(as_text(files, left_out))
    if dry_run:
        print(f"\nThis is a dry run: nothing was sent to the Space {repository}. To publish: --no-dry-run")
        return
    target = Target(HfApi(token=token), repository, "space", SDK, private=private or None)
    try:
        commit = publish(target, files, message, revision_tag)
    except PublishError as error:
        raise typer.Exit(fail(str(error))) from error
    print(f"published: {target.url} at {commit}")


if __name__ == "__main__":
    typer.run(main)
