"""A fork server whose children have imported Megatron-core."""

import pytest
from runs import Forks


def pytest_addoption(parser):
    parser.addoption("--every-pair", action="store_true", help="read every layout's checkpoint under every other")


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    server = Forks(tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("tokens"), "nemo_lite.parallel.megatron")
    yield server
    server.close()
