"""What can be a repository, a tag or a revision on the Hub, and what can't."""

import shutil
import subprocess

import pytest

from modeling_anee.publishing.names import check_repository, check_revision


@pytest.mark.parametrize("name", ["user/repo", "HuggingFaceTB/SmolLM2-135M", "a/b.c_d-e"])
def test_names_of_repositories(name):
    check_repository(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "repo",
        "user/",
        "/repo",
        "./repo",
        "../repo",
        "/models/my/repo",
        "a/b/c",
        "user/my repo",
        "user/repo ",
        "user/répo",
    ]
    + ["https://huggingface.co/user/repo", "user/repo.git", "user/a--b", "user/a..b", "user/-a", "user/" + "a" * 97, "~/repo"],
)
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="can't be on the Hub") as error:
        check_repository(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


REVISIONS = ["v1.0", "1", "a/b", "release-2026.11", "@a", "a@b", "0" * 40, "ü", None]
NO_REVISIONS = [
    "",
    " ",
    "v 1",
    "v1 ",
    "v1\n",
    "\tv1",
    "v..1",
    "v~1",
    "v^",
    "v:1",
    "v?",
    "v*",
    "v[1]",
    "v\\1",
    "/v1",
    "v1/",
    "a//b",
]
NO_REVISIONS += [".v1", "a/.b", "v1.", "v1.lock", "a.lock/b", "v@{1", "@", "-v1", "v\x7f", "v\udc80", "v\u00a01"]


@pytest.mark.parametrize("name", REVISIONS)
def test_revisions(name):
    check_revision("--revision", name)


@pytest.mark.parametrize("name", NO_REVISIONS)
def test_revisions_that_are_none(name):
    with pytest.raises(ValueError, match="--revision-tag .* is not allowed") as error:
        check_revision("--revision-tag", name)
    assert repr(name) in str(error.value)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_agrees():
    """It also takes what no terminal shows, and knows no bytes that are not UTF-8."""
    for name in [name for name in REVISIONS + NO_REVISIONS if name and name.isprintable()]:
        fine = subprocess.run(["git", "check-ref-format", f"refs/tags/{name}"], check=False).returncode == 0
        assert fine == (name in REVISIONS) or name in ("@", "-v1"), name  # those two only `git tag` refuses
