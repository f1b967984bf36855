"""README.md, CONTRIBUTING.md and docs/ are true: commands parse, cheap ones and all Python snippets run, files and links exist.

Commands and snippets run on tiny models. A command that this file does not know fails: add it to `CHECKS`. A snippet that
can't run here has a comment before it that names the test which does it: `<!-- tested by tests/test_x.py -->`.
"""

import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from modeling_anee.cli.main import app
from modeling_anee.data import smollm2
from modeling_anee.training.recipe import STAGE_NAMES

from .tiny import BRIDGES, tiny_base, wrap
from .workshop import make_workshop, recipe_fields


ROOT = Path(__file__).parents[1]
# In the order of a reader who tries everything: a page's commands and snippets go on from those of the pages before it.
PAGES = (
    "README.md",
    "docs/using.md",
    "docs/costs.md",
    "docs/resources.md",
    "docs/training.md",
    "docs/lossless.md",
    "docs/classification.md",
    "docs/measuring.md",
    "docs/pool.md",
    "docs/publishing.md",
    "docs/measurements.md",
    "docs/limits.md",
    "docs/design.md",
    "CONTRIBUTING.md",
)
README_LINES = 150
WIDTH = 128
VERBS = typer.main.get_command(app)


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, and the test that a comment before it names, if any."""

    page: str
    language: str
    text: str
    tested_by: str | None


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(*languages):
    """The fenced blocks of all pages in these languages."""
    fence = re.compile(r"(?:<!-- tested by (\S+) -->\n+)?^ *```([\w-]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    found = [Block(page, language, text, by or None) for page in PAGES for by, language, text in fence.findall(read(page))]
    return [block for block in found if block.language in languages]


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def lines_of(block):
    """The commands of a shell block, a continued line as one, without comments."""
    return [line for line in block.text.replace("\\\n", " ").splitlines() if shlex.split(line, comments=True)]


def inline_code(page):
    """What is in `backquotes` in a page's prose; line ends are spaces there."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands():
    """(page, command) of every shell line and of every piece of inline code that begins like a command."""
    found = [(block.page, line) for block in blocks("bash", "sh", "shell", "console") for line in lines_of(block)]
    for page in PAGES:
        found += [(page, code) for code in inline_code(page) if " " in code and code.split()[0] in CHECKS]
    return found


# What is checked of a command, by its first word. Each takes the words after it and raises ValueError with what is wrong.


def check_make(words):
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    variables = set(re.findall(r"^(\w+) \?=", read("Makefile"), re.MULTILINE))
    for word in words:
        known = variables if "=" in word else targets
        if word.partition("=")[0] not in known:
            raise ValueError(f"the Makefile has no {word!r}")


def check_anee(words):
    """A verb, and options that it has, with values that they take; "..." stands for more."""
    verb, *rest = words or [""]
    if verb.startswith("-"):
        return
    if verb not in VERBS.commands:
        raise ValueError(f"anee has no verb {verb!r}")
    command = VERBS.commands[verb]
    if hasattr(command, "commands") and rest:  # verbs of its own
        verb, *rest = rest
        if verb not in command.commands:
            raise ValueError(f"there is no verb {verb!r} of anee {words[0]}")
        command = command.commands[verb]
    given = [word for word in rest if word not in ("...", "…")]
    try:
        command.make_context(verb, list(given), resilient_parsing="..." in words or not given)
    except Exception as error:  # of click, or of what typer brings instead
        raise ValueError(getattr(error, "message", str(error)) or repr(error)) from error
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in given:
        if word.startswith("--") and word.partition("=")[0] not in options:
            raise ValueError(f"anee {verb} has no option {word}")


def check_pip(words):
    extras = set(re.findall(r"^([\w-]+) = \[", read("pyproject.toml").partition("optional-dependencies]")[2], re.MULTILINE))
    for word in words:
        for group in re.findall(r"^(?:\.|modeling-anee)\[([\w,-]+)\]$", word):
            if wrong := set(group.split(",")) - extras:
                raise ValueError(f"pyproject.toml has no extra {', '.join(wrong)}")


def check_launcher(words):
    """`torchrun` and `accelerate launch`: what they start."""
    if "-m" not in words:
        return check_python(words[1:])
    check_python(words[words.index("-m") :])


def check_python(words):
    """`python -m modeling_anee.cli.main ...`, or a script of the repository whose options its text has."""
    if words[:2] == ["-m", "modeling_anee.cli.main"]:
        return check_anee(words[2:])
    if words and not words[0].startswith("-"):
        script = ROOT / words[0]
        if not script.is_file():
            raise ValueError(f"there is no {words[0]}")
        text = script.read_text(encoding="utf-8")
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            if option not in text and not re.search(rf"\b{option[2:].replace('-', '_')}\b", text):
                raise ValueError(f"{words[0]} has no option {option}")


def check_lm_eval(words):
    from lm_eval._cli.harness import HarnessCLI

    if words[0] not in ("run", "ls", "validate"):
        words = ["run", *words]
    try:
        HarnessCLI()._parser.parse_args(words)
    except SystemExit as error:
        raise ValueError(f"lm_eval does not take {' '.join(words)!r}") from error
    for option, folder in zip(words, words[1:], strict=False):
        if option == "--include_path" and not (ROOT / folder).is_dir():
            raise ValueError(f"there is no {folder}")


CHECKS = {
    "accelerate": check_launcher,
    "anee": check_anee,
    "cd": None,
    "export": None,
    "git": None,
    "lm_eval": check_lm_eval,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_launcher,
}


def words_of(command):
    """The words of a command without what is set before it."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    return words


@pytest.mark.parametrize(("page", "command"), commands(), ids=[command for _, command in commands()])
def test_every_command_exists_with_its_options(page, command):
    first, *rest = words_of(command)
    assert first in CHECKS, f"{page}: {command!r}: this test does not know {first!r}; add a check of it to CHECKS"
    try:
        if CHECKS[first] is not None:
            CHECKS[first](rest)
    except ValueError as error:
        pytest.fail(f"{page}: {command!r}: {error}")


@pytest.mark.parametrize(
    ("check", "words", "message"),
    [
        (check_make, ["nothing"], "nothing"),
        (check_anee, ["frobnicate"], "frobnicate"),
        (check_anee, ["pool", "frobnicate"], "frobnicate"),
        (check_anee, ["pool", "rules", "POOL", "--frobnicate", "..."], "--frobnicate"),
        (check_anee, ["generate", "--no-such-option", "..."], "--no-such-option"),
        (check_anee, ["generate", "--prompt", "x", "--no-such-option", "1"], "--no-such-option"),
        (check_anee, ["generate", "--energy-budget", "much", "--prompt", "x"], "much|number"),
        (check_pip, ["install", "-e", ".[nothing]"], "nothing"),
        (check_launcher, ["-m", "modeling_anee.cli.main", "nothing"], "nothing"),
        (check_python, ["no_such_script.py"], "no_such_script.py"),
        (check_python, ["modeling_anee/version.py", "--frobnicate"], "--frobnicate"),
        (check_lm_eval, ["--frobnicate", "1"], "--frobnicate"),
    ],
)
def test_a_wrong_command_is_found(check, words, message):
    with pytest.raises(ValueError, match=message):
        check(words)


# Commands that are run: every `anee` line, in their order, on tiny models.

RECIPE_STAGES = {
    "closed_form": {"windows": 12, "ridge": 0.001},
    "traces": {"windows": 6, "kl_windows": 2},
}
# What keeps a verb short here. `bench` starts processes to measure their memory; `tests/test_cli.py` runs it.
NOT_RUN = {"bench"}
SMALL = {
    "analyze": ["--length", "16", "--limit", "2"],
    "compare": ["--length", "16", "--limit", "2", "--new-tokens", "2", "--repeats", "1"],
    "drafts": ["--length", "8", "--prompts", "2", "--new-tokens", "4"],
    "demo": ["--max-new-tokens", "2"],
    "generate": ["--max-new-tokens", "3"],
    "perplexity": ["--length", "16", "--limit", "2"],
    "samples": ["--max-new-tokens", "1"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny base, text, recipes and an artifact, which also stands in for the shipped one; tests run in it."""
    folder = tmp_path_factory.mktemp("readme")
    make_workshop(folder)
    copy = folder / smollm2.REPOSITORY.rsplit("/", 1)[-1]
    shutil.copytree(folder / "base", copy)
    text = {"train": [{"file": "text.txt", "tokens": 400, "stop": 0.6}], "choose": [{"file": "text.txt", "tokens": 40}]}
    anee = {"controller": "learned", "decision_interval": 1, **BRIDGES}
    recipe = recipe_fields(folder, length=16, text=text, anee=anee, stages=RECIPE_STAGES)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    wrap(tiny_base(), "plan", **smollm2.BASE_FIELDS, **BRIDGES).save_pretrained(folder / "shipped", tokenizer=tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ANEE_BASE_PATH", str(folder))
        patch.setattr(smollm2, "SHIPPED_ARTIFACT", folder / "shipped")
        yield folder


def stand_in(word, option, place):
    """What is put in for a word of a command that stands for something; `option` is the word before it."""
    known = {
        ("FOLDER", "--data"): place / "data",
        ("FOLDER", "--output"): place / "run",
        ("NEW_FOLDER", "--output"): place / "made",
        ("PLANS_FOLDER", "--output"): place / "plans",
        ("BASE", None): place / "base",
        ("FOLDER", "--fit"): place / "run",
        ("FOLDER", "ARTIFACT"): place / "exported",
        ("RECIPE.yaml", None): place / "recipe.yaml",
        ("FOLDER_OR_HUB_NAME", None): place / "base",
        ("ARTIFACT", None): place / "run" / "artifact",
        ("NAME=ARTIFACT", None): f"NAME={place / 'shipped'}",
        ("FILE", None): place / "data" / "text.txt",
        ("wiki.test.raw", None): place / "data" / "text.txt",
        ("POOL", None): place / "pool",
        ("PAIRS.jsonl", None): place / "data" / "pairs.jsonl",
        ("small=ARTIFACT@0.18!", None): f"small={place / 'run' / 'artifact'}@0.18!",
        ("large=BASE", None): f"large={place / 'base'}",
        ("...", None): "w5 w6",
    }
    if word.startswith("configuration/") and word.endswith(".yaml"):
        return str(place / "recipe.yaml")
    found = known.get((word, option)) or known.get((word, None))
    if found is None and re.fullmatch(r"[A-Z_=.]+(\.\w+)?", word):
        raise ValueError(f"this test has no stand-in for {word}; add one to stand_in")
    return word if found is None else str(found)


def test_the_anee_commands_run(place):
    for block in blocks("bash"):
        for line in lines_of(block):
            first, *words = words_of(line)
            if first != "anee" or words[0] in NOT_RUN:
                continue
            arguments = [stand_in(word, before, place) for before, word in zip([None, *words], words, strict=False)]
            if words[0] == "fit":  # the first recipe is fitted; the second goes on with the same run
                assert (ROOT / words[1]).is_file() or words[1].isupper(), line
            done = CliRunner().invoke(app, [*arguments, *SMALL.get(words[0], [])])
            assert done.exit_code == 0, f"{block.page}: {line!r}: {done.output}"
    assert (place / "scores.json").is_file() and (place / "run" / "artifact" / "README.md").is_file()


# Python snippets, in their order and in one namespace, as a reader would try them.

# Names of bases in snippets, and what they stand for here.
HUB_NAMES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "base"}


def test_the_python_snippets_run(place):
    namespace = {}
    snippets = [block for block in blocks("python", "py") if block.tested_by is None]
    assert len(snippets) >= 3
    for number, block in enumerate(snippets, 1):
        code = block.text
        for name, folder in HUB_NAMES.items():
            code = code.replace(name, str(place / folder))
        try:
            exec(compile(code, f"{block.page}, snippet {number}", "exec"), namespace)
        except Exception as error:
            raise AssertionError(f"{block.page}, snippet {number} fails: {error!r}\n{code}") from error
    assert (place / "my-artifact" / "model.safetensors").is_file()
    assert namespace["model"].config.energy_budget == 0.6


def test_snippets_that_are_tested_elsewhere_are_python_and_name_a_test():
    for block in blocks("python", "py", "bash"):
        if block.tested_by is not None:
            assert (ROOT / block.tested_by).is_file(), f"{block.page} names {block.tested_by}, which does not exist"
            if block.language != "bash":
                compile(block.text, block.page, "exec")


# Names


def listed_files(page):
    """Paths of a page's tree of files: folders end with "/"."""
    (block,) = (block for block in blocks("") if block.page == page and "the import package" in block.text)
    found, folders = set(), []
    for line in block.text.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        for word in line.split():
            if not re.fullmatch(r"[\w.-]+/|[\w-]+\.\w+", word):
                break
            path = "".join(folders[:indent]) + word
            found.add(path)
            if word.endswith("/"):
                folders[indent:] = [word]
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_the_trees_of_files_are_true(page):
    listed = listed_files(page)
    assert sorted(path for path in listed if not (ROOT / path).exists()) == [], f"{page} lists what does not exist"
    packages = {file.parent.relative_to(ROOT).as_posix() + "/" for file in (ROOT / "modeling_anee").glob("*/__init__.py")}
    assert sorted(packages - listed) == [], f"{page} lacks folders"


def test_the_tree_of_files_is_complete():
    listed = listed_files("docs/design.md")
    in_detail = {path.rpartition("/")[0] + "/" for path in listed if not path.endswith("/")}
    for folder in ("modeling_anee", "hub_scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            name = file.relative_to(ROOT).as_posix()
            parent = name.rpartition("/")[0] + "/"
            known = name in listed or (parent in listed and parent not in in_detail)
            assert known or file.name == "__init__.py", f"the tree of files in docs/design.md lacks {name}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]  # environments are
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in folder.rglob("*.*"))]
    here = [file.relative_to(ROOT).as_posix() for file in files]
    for code in inline_code(page):
        if re.fullmatch(r"[\w./-]+\.(py|yaml|md|toml)", code):
            assert any(f"/{path}".endswith(f"/{code}") for path in here), f"{page} names {code}, which does not exist"
        elif code.startswith(("configuration/", "tests/", "docs/", "hub_scripts/", "modeling_anee/")) and " " not in code:
            assert (ROOT / code).exists(), f"{page} names {code}, which does not exist"


def test_the_table_of_stages_is_in_the_order_of_the_code():
    table = read("docs/training.md").partition("| stage | makes |")[2].partition("\n\n")[0]
    first_cells = "".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
    assert re.findall(r"`(\w+)`", first_cells) == list(STAGE_NAMES)


# Links and form


def anchors(text):
    """What "#" can lead to in a page, as GitHub names its headings: one that is there again ends with -1, -2, ..."""
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        name = re.sub(r"[^\w -]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).lower().replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{again}" if again else name)
    return found


def broken_links(page, text):
    """Relative links and pictures of a page that lead nowhere."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        inside = file.resolve().is_relative_to(ROOT)
        if not inside or not file.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(prose(file.resolve().relative_to(ROOT).as_posix())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page, prose(page)) == []


def test_a_broken_link_is_found():
    good = "[a](using.md), [b](using.md#save-share-and-load), [c](#design), [d](../README.md#ten-lines), ![e](page.png)"
    assert broken_links("docs/design.md", f"{good} [f](https://example.org/#x)") == []
    wrong = ["nothing.md", "using.md#nothing", "#nothing", "docs/using.md", "../../README.md"]
    assert broken_links("docs/design.md", "".join(f"[x]({link}) " for link in wrong)) == wrong


def test_headings_that_are_there_twice_have_different_anchors():
    assert anchors("# A `b_c`, d\n## With [a link](x.md)\n## Same\n### Same") == ["a-b_c-d", "with-a-link", "same", "same-1"]


def test_every_page_is_checked_and_linked_from_the_readme():
    pages = {file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").glob("**/*.md")}
    assert pages <= set(PAGES), "add the page to PAGES"
    linked = set(re.findall(r"\]\(([^)#]+)", prose("README.md")))
    assert pages <= linked, f"the README has no link to {', '.join(sorted(pages - linked))}"


def test_every_picture_is_shown():
    pictures = {file.resolve() for file in (ROOT / "docs").glob("*.png")}
    shown = {
        ((ROOT / page).parent / target).resolve() for page in PAGES for target in re.findall(r"!\[.*?\]\((.+?)\)", prose(page))
    }
    assert pictures <= shown


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page):
    """Rows of tables can't be broken."""
    long = [line for line in read(page).splitlines() if len(line) > WIDTH and not line.startswith("|")]
    assert long == []
