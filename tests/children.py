"""Other processes: they end in time, tell what they said, and leave nothing behind.

`run` starts a program. `Forks` runs code in children of a process that has done its imports, in ms instead of seconds.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil


LIMIT = 240  # seconds; less than a test may take, so that the children are ended before it is
ROOT = Path(__file__).parents[1]
LIBRARIES = """
import accelerate, datasets, pydantic, torch, typer.testing, yaml
from transformers import LlamaForCausalLM, Trainer, pipeline
torch.set_num_threads(1)
"""
HIDE = "import sys; sys.modules['modeling_anee'] = None\n"  # as where our package is not installed


class Finished(NamedTuple):
    """How a process ended, with the signal's number and a minus if by one, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Outputs:
    """Files for what a process prints: unlike a pipe, one that nobody closes blocks nobody."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output, self.errors = folder / "stdout.txt", folder / "stderr.txt"

    def read(self) -> tuple[str, str]:
        return tuple(path.read_text(errors="replace") if path.exists() else "" for path in (self.output, self.errors))


@contextlib.contextmanager
def ended_with_all_below(process: subprocess.Popen, *outputs: Outputs):
    """End a process and all that it started if the block fails, by the limit of the test for example; print what they said."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            for each in (parent, *parent.children(recursive=True)):  # torchrun's workers have sessions of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait()
        for each in outputs:
            print(*each.read(), sep="\n")
        raise


def run(command: list, folder: Path, limit: float = LIMIT, **options: Any) -> Finished:
    """Run a program as `subprocess.run` does; what it prints goes through files in a folder.

    Raises:
        subprocess.TimeoutExpired: When time is up. What was printed until then is printed again.
    """
    outputs = Outputs(folder)
    with outputs.output.open("w") as output, outputs.errors.open("w") as errors:
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=errors, **options)
        with ended_with_all_below(process, outputs):
            process.wait(limit)
    return Finished(process.returncode, *outputs.read())


class Forks:
    """Children of `fork_server.py`, which is started when the first one is asked for.

    Args:
        home: `HF_HOME` of all children: the libraries read it once, when they are imported.
        imports: Code that the process runs before it forks.
    """

    def __init__(self, home: Path, imports: str = LIBRARIES) -> None:
        self.home, self.imports, self.count = home, imports, 0
        self.server: subprocess.Popen | None = None

    def start(self) -> None:
        self.stop()
        variables = os.environ | {"HF_HOME": str(self.home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        variables.pop("PYTHONPATH", None)
        command = [sys.executable, "-W", "error::FutureWarning", ROOT / "tests" / "fork_server.py", self.imports]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
        with ended_with_all_below(self.server):
            assert self.answer(LIMIT) == "ready"

    def run(self, code: str, *arguments: object, folder: Path | None = None, installed: bool = False) -> Finished:
        """Run code in one child, by default one that can't import our package."""
        return self.run_together(code, *arguments, each=[{}], folder=folder, installed=installed)[0]

    def run_together(
        self,
        code: str,
        *arguments: object,
        each: list[dict[str, str]],
        folder: Path | None = None,
        installed: bool = True,
        limit: float = LIMIT,
    ) -> list[Finished]:
        """Run code in several children, each with environment variables of its own.

        Raises:
            subprocess.TimeoutExpired: When time is up. What was printed until then is printed again.
        """
        if self.server is None or self.server.poll() is not None:
            self.start()
        self.count += 1
        outputs = [Outputs(self.home / "outputs" / f"{self.count}-{index}") for index in range(len(each))]
        common = {
            "code": code if installed else HIDE + code,
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder or self.home),
            "path": [str(ROOT)] if installed else [],  # the package that is tested, wherever another one may be installed
        }
        children = [
            common | {"variables": variables, "output": str(own.output), "errors": str(own.errors)}
            for variables, own in zip(each, outputs, strict=True)
        ]
        with ended_with_all_below(self.server, *outputs):
            print(json.dumps(children), file=self.server.stdin, flush=True)
            codes = self.answer(limit)
        return [Finished(code, *own.read()) for code, own in zip(codes, outputs, strict=True)]

    def answer(self, limit: float) -> Any:
        with selectors.DefaultSelector() as selector:
            selector.register(self.server.stdout, selectors.EVENT_READ)
            if not selector.select(limit):
                raise subprocess.TimeoutExpired("a child", limit)
        return json.loads(self.server.stdout.readline())

    def stop(self) -> None:
        if self.server is not None:
            with self.server as server:  # closes what it reads, which ends it
                self.server = None
                server.stdin.close()
