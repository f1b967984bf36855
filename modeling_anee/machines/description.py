"""Descriptions of machines that need not be here, as data: JSON files in which every number has a source."""

from dataclasses import dataclass
from pathlib import Path

from ..actions import FULL
from ..narrow import whole_of
from .schema import read_json


FORMAT = "anee-hardware-1"
FOLDER = Path(__file__).parent / "descriptions"
FLOAT32 = "float32"
PRECISIONS = ("int4", "int8", "bfloat16", FLOAT32)  # of arithmetic, narrowest first: what is not there runs in the next


@dataclass(frozen=True)
class Sourced:
    """A number, and where it is from or what it was assumed by.

    Raises:
        ValueError: no source, or a number below 0.
    """

    value: float
    source: str

    def __post_init__(self) -> None:
        """Check both."""
        if not self.source.strip():
            raise ValueError("source='' is not allowed: it must say where the number is from")
        if self.value < 0:
            raise ValueError(f"value={self.value} is not allowed: it must be a number from 0")


@dataclass(frozen=True)
class Description:
    """A machine.

    Args:
        format: `anee-hardware-1`.
        name: of the machine, one word.
        about: what it is.
        bandwidth_gb_s: of its memory.
        memory_gb: what weights, keys and values have to fit into.
        launch_us: microseconds until a kernel begins.
        skip_us: what leaving out a sublayer takes, to look whether it is.
        peak_gops: arithmetic by precision, in units of 1e9 operations a second; a multiplication and an addition are two.
        byte_pj: picojoules of a byte that is read.
        op_pj: of an operation, by precision.
        idle_watts: that it takes while it is on.

    Raises:
        ValueError: no arithmetic in float32, precisions that nobody knows, or what is 0 and may not be.
    """

    format: str
    name: str
    about: str
    bandwidth_gb_s: Sourced
    memory_gb: Sourced
    launch_us: Sourced
    skip_us: Sourced
    peak_gops: dict[str, Sourced]
    byte_pj: Sourced
    op_pj: dict[str, Sourced]
    idle_watts: Sourced

    def __post_init__(self) -> None:
        """Check what is needed of it."""
        if self.format != FORMAT:
            raise ValueError(f"format={self.format!r} is not allowed: it must be {FORMAT!r}")
        names, priced = set(self.peak_gops), set(self.op_pj)
        if FLOAT32 not in names or not names <= set(PRECISIONS) or priced != names:
            raise ValueError(
                f"peak_gops of {', '.join(sorted(names))} and op_pj of {', '.join(sorted(priced))} are not allowed: both must "
                f"be of the same ones of {', '.join(PRECISIONS)}, {FLOAT32} among them"
            )
        for name, one in {"bandwidth_gb_s": self.bandwidth_gb_s, "memory_gb": self.memory_gb, **self.peak_gops}.items():
            if not one.value:
                raise ValueError(f"{name}=0 is not allowed: it must be above 0")

    @classmethod
    def find(cls, name: str) -> "Description":
        """One that comes with the package, by its name, or from a file.

        Raises:
            ValueError: there is none; or the file is none, and the message has the place in it.
            OSError: the file can't be read.
        """
        known = {file.stem: file for file in sorted(FOLDER.glob("*.json"))}
        file = known.get(name, Path(name))
        if not file.is_file():
            raise ValueError(f"hardware {name!r} is not allowed: it must be a JSON file or one of {', '.join(known)}")
        return read_json(file, cls)

    def precision_of(self, variant: str, dtype: str) -> str:
        """What linear maps of a variant compute in: the narrowest arithmetic that is there and not narrower than they are."""
        variant = whole_of(variant)
        own = dtype if variant == FULL else variant
        wanted = PRECISIONS[PRECISIONS.index(own) if own in PRECISIONS else len(PRECISIONS) - 1 :]
        return next(precision for precision in wanted if precision in self.peak_gops)

    @property
    def bytes_per_ms(self) -> float:
        """Bytes of memory that are read in a millisecond."""
        return self.bandwidth_gb_s.value * 1e6

    def ops_per_ms(self, precision: str) -> float:
        """Operations in a millisecond."""
        return self.peak_gops[precision].value * 1e6
