"""`Run`: one fit in one output folder; what every stage works with. What the stages do is in files of their own."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from ..data.bases import load_base_of
from ..data.documents import token_windows
from ..data.progress import progress
from ..data.randomness import derive_seed, seeded
from ..modeling_anee import AneeForCausalLM
from .checkpoint import in_half, read_tensors, write_tensors
from .log import RunLog
from .recipe import LongStage, Recipe, check_anee_fields
from .start import Start
from .state import RunState, checkpoint_of, work_of


BASE_PREFIX = "base."  # of the names of what is not ours


@dataclass
class Run:
    """One fit in one folder. Open it with `Run.open`.

    A stage reads its settings, draws from `generator`, saves checkpoints and returns the fields of `AneeConfig` that it
    sets. All randomness is a function of the step, so a run that was interrupted ends as one that was not.
    """

    recipe: Recipe
    folder: Path
    data_dir: Path
    accelerator: Accelerator
    model: AneeForCausalLM
    tokenizer: Any
    base_fields: dict[str, Any]
    state: RunState
    run_log: RunLog | None  # of the main process

    @classmethod
    def open(cls, recipe: Recipe, folder: Path, data_dir: Path) -> "Run":
        """Begin a run in a new or empty folder, or go on with the one in `folder`.

        Raises:
            ValueError: the folder has other things in it or a run of another recipe, the device is not there, or the
                artifact to start from does not fit.
            OSError: the base or that artifact can't be found, or a file of the run is damaged.
            ImportError: the recipe wants TensorBoard, and it is not installed.
        """
        accelerator = make_accelerator(recipe.device)
        state = RunState.of(recipe, folder)
        located = recipe.located()
        start = Start.of(located) if state.own is None else None
        if start is not None:
            state = replace(state, config=start.fields)
        run_log = RunLog(folder, recipe.tensorboard) if accelerator.is_main_process else None
        base, tokenizer, base_fields = load_base_of(located.base)
        fields = recipe.anee | base_fields | state.config
        model = wrap(base.to(accelerator.device), fields, recipe.seed)
        run = cls(recipe, folder, data_dir, accelerator, model, tokenizer, base_fields, state, run_log)
        if state.own is not None:
            run.load_own(read_tensors(folder / state.own)[0])
        elif start is not None:
            start.load_into(run.own())
        accelerator.wait_for_everyone()  # all have looked at the folder before it changes
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            state.write(folder)
        accelerator.wait_for_everyone()
        return run

    # What a stage reads

    @property
    def done(self) -> list[str]:
        """Names of the finished stages."""
        return self.state.done

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def settings(self, stage: str) -> Any:
        """The recipe's section for a stage."""
        return getattr(self.recipe.stages, stage)

    def windows(self, part: str) -> Tensor:
        """Token windows int64 [W, length] of `recipe.text`'s part "train", "calibrate" or "choose"; made once, then kept.

        Raises:
            ValueError: the recipe gives no text for it, or too little for one window.
        """
        path = self.folder / f"windows-{part}.safetensors"
        if self.accelerator.is_main_process:
            sources, made_of = getattr(self.recipe.located().text, part), self.recipe.text_of(part)
            if not sources:
                raise ValueError(f"text.{part}=[] is not allowed: a stage needs text from it")
            if not path.exists() or read_tensors(path)[1] != made_of:  # a run that did nothing may have another recipe now
                seed = derive_seed(self.recipe.seed, "text", part)
                with progress(f"tokens to {part} on", sum(source.tokens for source in sources)) as advance:
                    windows = token_windows(
                        sources, self.tokenizer, self.recipe.length, self.data_dir, seed, self.model.base, advance
                    )
                write_tensors(path, {"windows": windows}, made_of)
        self.accelerator.wait_for_everyone()
        return read_tensors(path)[0]["windows"]

    def generator(self, stage: str, step: int) -> torch.Generator:
        """A CPU generator for one step of a stage: the same one whenever it is asked for."""
        return torch.Generator().manual_seed(derive_seed(self.recipe.seed, stage, step))

    # Our modules

    def own(self) -> dict[str, Tensor]:
        """Parameters and buffers of our modules by name, none of the base's; by reference."""
        return {name: value for name, value in self.model.state_dict().items() if not name.startswith(BASE_PREFIX)}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of our modules by name."""
        return {name: value for name, value in self.model.named_parameters() if not name.startswith(BASE_PREFIX)}

    def load_own(self, tensors: dict[str, Tensor]) -> None:
        """Copy values into our modules; other tensors, such as an optimiser's, are left alone.

        Raises:
            ValueError: one of our tensors is missing.
        """
        names = self.own().keys()
        missing = sorted(names - tensors.keys())
        if missing:
            raise ValueError(f"the file of this run lacks {', '.join(missing[:4])}: it was written by another version")
        self.model.load_state_dict({name: tensors[name] for name in names}, strict=False)

    # Progress of a stage

    def begin(self, stage: str) -> None:
        """Go on with a stage at its checkpoint, or from its beginning; what it logged of later steps is dropped."""
        saved = self.load(stage)
        if self.run_log is not None:
            self.run_log.begin(stage, 0 if saved is None else saved[0], self.done)

    def save(self, stage: str, step: int, tensors: dict[str, Tensor], values: dict[str, Any] | None = None) -> None:
        """Write the stage's one checkpoint.

        Args:
            stage: its name.
            step: the next step, that is, how many are done.
            tensors: all that the stage needs to go on, `own()` and `optimizer_tensors(...)` for example.
            values: what else it needs, as JSON can hold it.
        """
        if self.accelerator.is_main_process:
            write_tensors(self._checkpoint(stage), tensors, {"step": step, "values": values or {}})

    def load(self, stage: str) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """What `save` was last given for a stage: step, tensors (on the CPU), values; None without a checkpoint.

        Raises:
            OSError: the checkpoint is damaged; the message names the file.
        """
        path = self._checkpoint(stage)
        found = read_tensors(path) if path.exists() else None
        self.accelerator.wait_for_everyone()  # none goes on and replaces it before all have read it
        return None if found is None else (found[1]["step"], found[0], found[1]["values"])

    def finish(self, stage: str, config_updates: dict[str, Any] | None = None) -> None:
        """Mark a stage as done, with our modules and the fields of `AneeConfig` that it set.

        With such fields, `model` is built anew, as it is when a run is opened: modules of the same name keep their
        weights, new ones are untrained, and those that the fields drop are gone.

        Raises:
            ValueError: a field that a stage may not set, or weights that have diverged; that message says how to begin again.
        """
        with self._diverged(stage):
            in_half(self.own())
        updates = json.loads(json.dumps(check_anee_fields(config_updates or {})))
        config = self.state.config | updates | {"base_fingerprint": self.model.config.base_fingerprint}
        if updates:
            self._rebuild(config)
        name = f"own-{stage}.safetensors"
        self.state = replace(self.state, done=[*self.state.done, stage], config=config, own=name)
        if self.run_log is not None:
            self.run_log.close()
            write_tensors(self.folder / name, self.own())
            self.state.write(self.folder)  # from here on the stage is done
            self._checkpoint(stage).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def _rebuild(self, config: dict[str, Any]) -> None:
        own = self.own()
        self.model = wrap(self.model.base, self.recipe.anee | self.base_fields | config, self.recipe.seed)
        kept = {name: own[name] for name in own.keys() & self.own().keys()}
        self.model.load_state_dict(kept, strict=False)

    def _checkpoint(self, stage: str) -> Path:
        return checkpoint_of(stage, self.folder)

    def log(self, stage: str, step: int, **numbers: float) -> None:
        """Write one line of numbers to `log.jsonl` (main process only).

        Raises:
            ValueError: a number is not finite: the stage has diverged; the message says how to begin it again.
        """
        if self.run_log is not None:
            with self._diverged(stage):
                self.run_log.write(stage, step, numbers)

    @contextlib.contextmanager
    def _diverged(self, stage: str) -> Iterator[None]:
        """Add how to begin a stage again to the error of numbers that are not finite."""
        try:
            yield
        except ValueError as error:
            rate = ", a lower learning_rate for example" if isinstance(self.settings(stage), LongStage) else ""
            work = work_of(stage, self.folder)
            delete = f", delete {work}" if work.exists() else ""
            raise ValueError(
                f"{error}. To begin the stage {stage} again, change stages.{stage} in the recipe{rate}{delete}, and give the "
                "same command: the stages before it are kept"
            ) from error

    def track(self, total: int, description: str, start: int = 0) -> Iterator[int]:
        """Steps from `start` to `total`, with progress on stderr (main process only)."""
        with progress(description, total, start, keep=True) as advance:
            for step in range(start, total):
                yield step
                advance(1)

    # Several processes

    def rows(self, batch: Tensor) -> Tensor:
        """This process's equal share of the rows of a batch [B, ...] -> [B / processes, ...].

        Raises:
            ValueError: the rows can't be shared equally, so that a mean over processes would not be one over rows.
        """
        count = self.accelerator.num_processes
        if len(batch) % count:
            raise ValueError(f"a batch of {len(batch)} rows can't be shared equally by {count} processes")
        return batch.chunk(count)[self.accelerator.process_index]

    def share(self, batch: Tensor) -> Tensor:
        """This process's share of the rows of a batch, which may be fewer than that of others: for sums, not means."""
        return batch[self.accelerator.process_index :: self.accelerator.num_processes]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        return tensor if self.accelerator.num_processes == 1 else self.accelerator.reduce(tensor, reduction="sum")

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over all processes; one that is missing in some counts as zero there."""
        if self.accelerator.num_processes == 1:
            return
        parameters = list(parameters)
        used = self.sum(torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)).tolist()
        present = [p for p, processes in zip(parameters, used, strict=True) if processes]
        if not present:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in present]
        mean = self.sum(torch.cat([gradient.flatten() for gradient in gradients])) / self.accelerator.num_processes
        for parameter, part in zip(present, mean.split([p.numel() for p in present]), strict=True):
            parameter.grad = part.view_as(parameter).clone()


def make_accelerator(device: str) -> Accelerator:
    """The processes and devices of a run; `device` is "cpu", "cuda" or "auto".

    Raises:
        ValueError: CUDA is wanted and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' is not allowed: this machine has no CUDA device; use 'cpu' or 'auto'")
    # The others wait while the main process prepares text, which may take hours.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    return Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[patience])


def wrap(base: Any, fields: dict[str, Any], seed: int) -> AneeForCausalLM:
    """A base with our modules, untrained: the same for the same seed."""
    with seeded(derive_seed(seed, "modules"), torch.device("cpu")):
        return AneeForCausalLM.from_base(base, **fields)
