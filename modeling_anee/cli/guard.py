"""The one guard at the boundary of the command: whatever goes wrong in a verb is one line on stderr and an exit code."""

import contextlib
import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from ..data.out_of_memory import is_out_of_memory
from .console import STDOUT, flush


INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13  # what a shell says of a process that such a signal has ended
# Errors that are raised with a message for users; others get the name of their class.
SPEAKING = (OSError, ValueError, ImportError, NotImplementedError)
DebugOption = Annotated[bool, typer.Option("--debug", envvar="ANEE_DEBUG", help="Show where an error comes from.")]


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb with the option --debug, whose every error is one line, `error: ...`, and the exit code 1.

    An interrupt ends it with 130. A reader of its output that has gone ends it quietly with 141.
    """

    @functools.wraps(verb)
    def command(*, debug: bool, **options: Any) -> None:
        with one_line_errors(debug):
            verb(**options)
            flush()

    signature, option = inspect.signature(verb), inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False)
    parameters = [*signature.parameters.values(), option.replace(annotation=DebugOption)]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = verb.__annotations__ | {"debug": DebugOption}
    return command


@contextlib.contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn every error into a line on stderr and an exit code; with `debug` a traceback comes before the line."""
    with _closed_streams_replaced():
        try:
            yield
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            raise typer.Exit(_report(error, debug)) from error


def _report(error: Exception, debug: bool) -> int:
    """Say what an error is; returns the exit code for it."""
    of_stdout = isinstance(error, OSError) and error.filename == STDOUT
    if of_stdout:
        _forget_stdout()
    if debug:
        traceback.print_exc()
    if of_stdout and isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    print(f"error: {explain(error)}", file=sys.stderr)
    return 1


def explain(error: Exception) -> str:
    """One line for a user."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    text = _folded(str(error))
    if is_out_of_memory(error):
        return f"out of memory ({text or type(error).__name__}): a smaller batch, shorter texts or another --dtype need less"
    if isinstance(error, SPEAKING) and text:
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text} (--debug shows where it comes from)"


def _folded(text: str) -> str:
    """Lines as one."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return "".join(line + (" " if line[-1] in ".:;,?!" else "; ") for line in lines[:-1]) + "".join(lines[-1:])


@contextlib.contextmanager
def _closed_streams_replaced() -> Iterator[None]:
    """Give what is printed somewhere to go: a stream that was closed before Python began is None."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        if sys.stdout is None:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        if sys.stderr is None:
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def _forget_stdout() -> None:
    """Let what can't be written go nowhere: Python would try again, and complain, at its end."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # some have no descriptor
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
