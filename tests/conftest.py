"""Settings for every test: one thread (tiny tensors are slower with more), property tests that repeat exactly in CI,
Triton's interpreter where there is no GPU."""

import os

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, which chooses then
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser):
    parser.addoption(
        "--sanitize",
        choices=("address", "undefined"),
        help="compile the CPU kernels with this sanitiser, for the best level of this machine and avx2 (make sanitize)",
    )


def pytest_configure(config):
    from nemo_lite_kernels import cpu

    sanitize = config.getoption("--sanitize")
    if sanitize is None:
        # Without a compiler the kernels' tests are skipped; kernels that do not compile are a failure.
        if cpu.unavailable() is None and (why := cpu.reason()) is not None:
            raise pytest.UsageError(f"the CPU kernels: {why}")
        return
    best = cpu.levels()[0]
    kept = tuple(level for level in cpu.levels() if level in (best, "avx2"))
    cpu.levels = lambda: kept
    try:
        cpu.use(best, sanitize)
    except cpu.BuildError as error:
        raise pytest.UsageError(f"--sanitize {sanitize}: {error}") from error
