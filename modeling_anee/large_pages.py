"""Memory in large pages for weights that are read from beginning to end for every token.

With pages of 4 KiB a kernel that reads 8 bits a weight waits for addresses: on a Xeon it read 17 GB/s, in pages of 2 MiB 27.
Linux gives them where it is asked to (`madvise`); elsewhere this is ordinary memory.
"""

import mmap
from collections import defaultdict
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor


CHUNK = 1 << 24  # bytes that are asked for at once
ALIGNMENT = 64  # bytes


class LargePages:
    """Hands out parts of chunks; a chunk is let go with the last tensor in it."""

    def __init__(self) -> None:
        self._lock, self._chunk, self._used = Lock(), mmap.mmap(-1, ALIGNMENT), ALIGNMENT

    def copy(self, x: Tensor) -> Tensor:
        """A contiguous copy of a tensor on the CPU."""
        if x.nbytes == 0:
            return x.contiguous()
        with self._lock:
            if self._used + x.nbytes > len(self._chunk):
                self._chunk, self._used = new_chunk(max(x.nbytes, CHUNK)), 0
            place = torch.frombuffer(self._chunk, dtype=x.dtype, count=x.numel(), offset=self._used).view(x.shape)
            self._used += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        return place.copy_(x)


def new_chunk(size: int) -> mmap.mmap:
    """Memory of so many bytes, which is not there before it is written."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    chunk = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # what is shared has small pages
    with suppress(OSError):  # a kernel without large pages
        chunk.madvise(mmap.MADV_HUGEPAGE)
    return chunk


LARGE_PAGES: dict[str, LargePages] = defaultdict(LargePages)  # by variant: what is let go together shares no chunk with others
