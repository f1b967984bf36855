"""The one guard at the boundary of the command: whatever goes wrong in a verb is one line on stderr and an exit code."""

import contextlib
import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TextIO

import typer

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
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None: closed
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from error
    except Exception as error:
        broken_pipe = isinstance(error, BrokenPipeError) and error.filename == STDOUT
        if isinstance(error, OSError) and error.filename == STDOUT:
            _forget(sys.stdout)
        if debug:
            traceback.print_exc()
        if not broken_pipe:
            print(f"error: {explain(error)}", file=sys.stderr)
        raise typer.Exit(BROKEN_PIPE if broken_pipe else 1) from error


def explain(error: Exception) -> str:
    """One line for a user."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if _is_out_of_memory(error):
        return f"out of memory ({text or type(error).__name__}): a smaller batch, shorter texts or another --dtype need less"
    if isinstance(error, SPEAKING) and text:
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text} (--debug shows where it comes from)"


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch says so in words only.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _forget(stream: TextIO) -> None:
    """Let what can't be written any more go nowhere, or Python would complain of it at its end."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
