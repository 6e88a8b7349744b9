"""The C++ kernels at one level of the instruction set: what the fixtures of their tests have in common."""

from contextlib import contextmanager

import pytest
from nemo_lite_kernels import cpu


@contextmanager
def compiled_for(level: str):
    """The kernels of `level` (of the build, sanitised or not, that was in use); skips where this machine has none."""
    if level not in cpu.levels():
        pytest.skip(f"this machine has no {level}")
    before = cpu._variant
    if (why := cpu.unavailable()) is not None:
        pytest.skip(why)
    cpu.use(level, before[1])
    try:
        yield
    finally:
        cpu._variant = before
