"""Putting files on the Hub whole or not at all.

Everything goes in one commit, which the Hub takes whole or refuses. `HfApi.upload_folder` is not used, since with Xet it
may split a folder into several commits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from .names import check_repository
from .plan import PlannedFile


class PublishError(OSError):
    """Something went wrong on the way; the message says in what state the Hub is."""


@dataclass(frozen=True)
class Target:
    """Where files go.

    Args:
        api: client with endpoint and token.
        name: `USER/REPO`.
        kind: `"model"` or `"space"`.
        sdk: of a Space.
        private: the repository must be private; None leaves an existing one as it is and makes a new one public.

    Raises:
        ValueError: a name that can't be on the Hub.
    """

    api: HfApi
    name: str
    kind: str = "model"
    sdk: str | None = None
    private: bool | None = None

    def __post_init__(self) -> None:
        """Check the name."""
        check_repository(self.name)

    @property
    def url(self) -> str:
        """Page of the repository."""
        return f"{self.api.endpoint}/{'spaces/' if self.kind == 'space' else ''}{self.name}"

    def head(self) -> str:
        """The commit that `main` is at."""
        return str(self.api.repo_info(self.name, repo_type=self.kind, revision="main").sha)

    def prepare(self, tag: str | None) -> tuple[bool, str]:
        """Make sure that there is a repository that the files may go to: (was it made now, the head of `main`).

        Raises:
            PublishError: it can't be made or seen, is public although a private one was asked for, or has that tag.
        """
        # What the client raises has no public base class: its HTTP library's errors pass through.
        try:
            found = self.api.repo_info(self.name, repo_type=self.kind)
            tags = [ref.name for ref in self.api.list_repo_refs(self.name, repo_type=self.kind).tags]
        except RepositoryNotFoundError:
            return True, self._create()
        except Exception as error:
            raise PublishError(f"{self.url} can't be looked at: {error}\nNothing was sent.") from error
        if self.private and not found.private:
            raise PublishError(f"{self.url} exists and is public, but --private was given. Nothing was sent.")
        if tag in tags:
            raise PublishError(f"{self.url} has a tag {tag!r} already; tags are not moved. Nothing was sent.")
        return False, self.head()

    def _create(self) -> str:
        try:
            self.api.create_repo(self.name, repo_type=self.kind, space_sdk=self.sdk, private=self.private)
            return self.head()
        except Exception as error:
            raise PublishError(
                f"{self.url} does not exist, or your token can't see it, and making it failed: {error}\nNo file was sent."
            ) from error


def publish(
    target: Target, files: Sequence[PlannedFile], message: str, tag: str | None, say: Callable[[str], None] = print
) -> str:
    """Send files in one commit, check that the Hub has them, and tag the commit; returns its id.

    Args:
        target: where to.
        files: what; other files of the repository are left as they are.
        message: of the commit.
        tag: for the commit; None for none.
        say: gets lines about the progress.

    Raises:
        PublishError: anything failed; the message says what the Hub has now.
    """
    created, before = target.prepare(tag)
    say(f"{'made' if created else 'found'} {target.url}")
    operations = [CommitOperationAdd(file.path.name, file.path) for file in files]
    try:
        commit = target.api.create_commit(
            target.name, operations, commit_message=message, repo_type=target.kind, revision="main", parent_commit=before
        ).oid
    except BaseException as error:  # an interrupt by the user leaves the same question: what does the Hub have now?
        commit = _after_failure(target, files, before, created, error)
        say("the answer to the commit was lost, but the commit arrived")
    check(target, files, commit)
    say(f"checked: the {len(files)} files are at {commit}" + (", which was there already" if commit == before else ""))
    if tag is not None:
        try:
            target.api.create_tag(target.name, tag=tag, revision=commit, repo_type=target.kind)
        except Exception as error:
            raise PublishError(
                f"all files are at {target.url} at {commit}, but the tag {tag!r} can't be made: {error}"
            ) from error
        say(f"tagged {tag}")
    return commit


def check(target: Target, files: Sequence[PlannedFile], commit: str) -> None:
    """Compare what the Hub has at a commit with what was sent.

    Raises:
        PublishError: something is missing or differs, or the Hub can't be asked.
    """
    try:
        wrong = differences(target, files, commit)
    except Exception as error:
        raise PublishError(f"the commit {commit} arrived at {target.url}, but can't be checked: {error}") from error
    if wrong:
        raise PublishError(f"{target.url} at {commit} is not what was sent: {'; '.join(wrong)}. It has no new tag.")


def differences(target: Target, files: Sequence[PlannedFile], revision: str) -> list[str]:
    """Files that the Hub does not have at a revision, or has with other content."""
    tree = target.api.list_repo_tree(target.name, recursive=True, revision=revision, repo_type=target.kind)
    remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    missing = [f"{file.path.name} is missing" for file in files if file.path.name not in remote]
    other = [file.path.name for file in files if file.path.name in remote and not file.matches(remote[file.path.name])]
    return missing + [f"{name} differs" for name in other]


def _after_failure(target: Target, files: Sequence[PlannedFile], before: str, created: bool, error: BaseException) -> str:
    """The commit, if it arrived all the same; otherwise say what the Hub has, without a repository that we made for nothing.

    Raises:
        PublishError: it did not arrive.
    """
    try:
        now = target.head()
        if now != before and not differences(target, files, now):
            return now
        if now != before:
            state = f"{target.url} was changed by someone else meanwhile: main is at {now}. Look at it, then push again."
        elif not created:
            state = f"Nothing was published: main of {target.url} is still at {before}."
        else:
            target.api.delete_repo(target.name, repo_type=target.kind)
            state = f"Nothing was published: {target.url}, which had been made for this and was still empty, is deleted again."
    except Exception as second:
        made = " It was made for this; delete it if it is empty." if created else ""
        state = f"What {target.url} has now is not known ({second}); it was at {before}.{made}"
    raise PublishError(f"the push failed: {error or type(error).__name__}\n{state}") from error
