"""Compilation of loops to machine code that other threads run beside.

What their authors have to know of numba: signed indexes cost a test for negative ones each, so those that are computed
are uint64; mixed numbers become 64 bits wide, so constants have the type of what they meet; nothing checks bounds, nor
divisors, as a test of each would keep divisions from being vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """``function`` compiled at its first call, and kept on disk for the next process where that can be written."""
    result: Any
    try:
        result = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the package's folder nor a home
        result = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Function, result)
