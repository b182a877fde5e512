"""glibc's allocator, told to keep what tensors have freed."""

from __future__ import annotations

import ctypes
import functools

# Of <malloc.h>. Setting either ends glibc's own moving of both thresholds.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1  # mallopt takes an int


@functools.cache
def keep_freed_memory() -> bool:
    """Keep freed memory in this process for the next tensor; returns whether the C library could be told so.

    By default glibc gives every large tensor fresh pages and takes them back when it is freed, so that each activation
    of each step is cleared by the kernel, page by page, before it is written. The peak of memory stays about the same;
    what the process has reached, it keeps. Nothing that is computed changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: musl, macOS, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))
