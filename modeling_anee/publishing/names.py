"""Names that the Hub takes, checked before it is asked: of repositories, and of tags and other revisions."""

import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


# What `git check-ref-format` and `git tag` refuse.
NO_REVISION = re.compile(
    r"^$|^@$|^-|^/|/$|//|\.\.|@\{"  # nothing, @, a leading dash, empty parts, ranges, reflogs
    r"|[~^:?*\[\\]|(^|/)\.|\.$|\.lock(/|$)"  # what means something to git
)


def check_repository(name: str) -> None:
    """Notice what can't be a repository or a Space of a user or an organisation.

    Raises:
        ValueError: it is not USER/REPO, such as a path or an address.
    """
    try:
        validate_repo_id(name)
        reason = "" if "/" in name else "there is no user or organisation before it"
    except HFValidationError as error:
        reason = str(error).split(": '")[0].removesuffix(".")
    if reason:
        raise ValueError(f"repository {name!r} can't be on the Hub, where names are like USER/REPO: {reason}")


def check_revision(option: str, name: str | None) -> None:
    """Notice what can't be a tag, a branch or a commit; None is none.

    Args:
        option: what gave it, for the error.
        name: the tag, branch or commit.

    Raises:
        ValueError: git does not allow such a name.
    """
    if name is not None and (" " in name or not name.isprintable() or NO_REVISION.search(name)):
        raise ValueError(
            f"{option} {name!r} is not allowed: it must be a name that git takes, such as v1.0, without blanks and ~^:?*[\\"
        )
