"""Fixtures of the training tests, and the option that stores new golden losses."""

import pytest
from runs import ROOT, Forks


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="store the losses of this machine as the golden ones")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The recipes in tests/recipes name their text from the repository's root."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A token cache that all tests share."""
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="session")
def forks(tmp_path_factory, cache):
    server = Forks(tmp_path_factory.mktemp("logs"), cache)
    yield server
    server.close()
