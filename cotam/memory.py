"""The allocator of the C library, told to keep what tensors free.

glibc returns freed blocks of some hundred kilobytes to the kernel, and getting them back costs a page fault every
4 KiB: 5,000 a 768x512 image, a quarter of the time it takes to encode it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools

import pyarrow as pa

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_KEPT_BYTES = 2**25  # the most that glibc takes for it: larger blocks still go back at once
_KEPT_BYTES = 2**29


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep freed memory, some 512 MiB a heap, for its next tensors; does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        assert libc.gnu_get_libc_version  # AttributeError elsewhere, where the numbers may mean something else
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Give back what was kept, between two partitions: else fragments add up to the limit over hours."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def use_malloc_for_arrow() -> None:
    """Let Arrow allocate from the C library: what its own allocator frees stays with the process, 16 MiB and more."""
    pa.set_memory_pool(pa.system_memory_pool())
