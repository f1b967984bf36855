"""Choosing before: a pool of models under budgets, and policies that say which of them serves a request.

Not shipped with artifacts. What it leaves out: requests are served one after the other, and rungs stay loaded.
"""

from .config import FILE_NAME, PoolConfig
from .pool import AneePool, PoolOutput


__all__ = ["FILE_NAME", "AneePool", "PoolConfig", "PoolOutput"]
