"""Making a pool: rungs as a command names them, measured on texts, with the settings of every policy fitted to that."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import Measured, PoolConfig, RungConfig
from .fitting import fit_cascade, fit_fuzzy, fit_learned, fit_mixture, front
from .measuring import Sample


RUNG = re.compile(r"(?P<name>[\w.+-]+)=(?P<model>[^@]+)(@(?P<setting>[^@!]+)(?P<strict>!)?)?")


def parse_rung(text: str, folder: Path, dtype: str) -> RungConfig:
    """A rung of `NAME=MODEL`, `NAME=MODEL@BUDGET`, `NAME=MODEL@BUDGET!` (no token above it) or `NAME=MODEL@PLAN`.

    A relative folder is kept relative to the pool's.

    Raises:
        ValueError: it is none of these.
    """
    found = RUNG.fullmatch(text)
    if found is None:
        raise ValueError(f"--rung {text!r} is not allowed: it must be NAME=MODEL, NAME=MODEL@BUDGET or NAME=MODEL@PLAN")
    model, setting = found["model"], found["setting"]
    if os.path.isdir(model) and not os.path.isabs(model):
        model = os.path.relpath(model, folder)
    fields: dict[str, Any] = {"name": found["name"], "model": model, "dtype": dtype, "strict": found["strict"] is not None}
    if setting is not None:
        try:
            fields["energy_budget"] = float(setting)
        except ValueError:
            fields["plan"] = setting
    return RungConfig(**fields)


def make_config(
    rungs: Sequence[RungConfig],
    measured: dict[str, Measured],
    samples: Sequence[Sample],
    prices: Sequence[float],
    glance: str | None = None,
) -> PoolConfig:
    """The file of a pool, with settings for every policy.

    Args:
        rungs: what it has.
        measured: what was measured of each.
        samples: the examples that this was measured on.
        prices: for each of these `learned` and `mixture` are fitted; the middle one is the default.
        glance: the rung that looks at requests; default: the cheapest.
    """
    names = front(measured)
    looks = glance or min(measured, key=lambda name: measured[name].bytes_per_token)
    return PoolConfig(
        rungs=list(rungs),
        glance=looks,
        price=sorted(prices)[len(prices) // 2],
        measured=measured,
        fuzzy=fit_fuzzy(samples, looks, measured),
        learned=[fit_learned(samples, looks, names, price) for price in sorted(prices)],
        mixture=[fit_mixture(samples, looks, names, price) for price in sorted(prices)],
        cascade=fit_cascade(samples, measured),
    )
