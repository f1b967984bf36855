"""The processes that measure together: those of `torchrun` or `accelerate launch`, or this one alone."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """This process among all that work together.

    Args:
        index: of this process; 0 is the main one, which prints and writes.
        count: how many there are.
        local_index: of this process on its machine, for its CUDA device.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.index == 0

    def device(self, name: str) -> str:
        """Where this process computes if all are told to compute on `name`: "cuda" is one device for each."""
        return f"cuda:{self.local_index}" if name == "cuda" and self.count > 1 else name

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor on the CPU over all processes; each of them must ask."""
        if self.count == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Around what one process should have done before the others do it, such as fetching a file."""
        if not self.is_main:
            distributed.barrier()
        yield
        if self.is_main and self.count > 1:
            distributed.barrier()


ALONE = Processes()


@contextlib.contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that a launcher has started, which sets `WORLD_SIZE` and its like; without one, `ALONE`.

    They speak gloo, on GPUs too, since all they tell each other is sums of a few numbers.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    distributed.init_process_group("gloo", timeout=timedelta(days=7))  # shares of a long text may differ by hours
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        distributed.destroy_process_group()
