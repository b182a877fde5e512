"""Freed memory stays with the process, so that the next tensor finds its pages there."""

from __future__ import annotations

import platform

import pytest

from tests.preloaded import Preloaded

# 64 MB, written and freed ten times: every page is new to the kernel each time, or only the first.
_FAULTS = """
import resource, sys
import numpy as np
from robx.distill.training.processes import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
np.ones(16 << 20, dtype=np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(16 << 20, dtype=np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str, preloaded: Preloaded) -> int:
    return int(preloaded.run(["-c", _FAULTS, how])[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_kept_memory_is_not_asked_of_the_kernel_again(preloaded: Preloaded) -> None:
    assert _faults("keep", preloaded) < 0.1 * _faults("leave", preloaded)
