"""Options of the test suite."""

import os

import pytest

# Tests run in two processes, and many start ranks of their own: one thread each, set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    # Only `pytest tests/gpu` sees a GPU: other tests have the ranks, times and figures of a CPU wherever they run.
    if not all("gpu" in argument.partition("::")[0].split("/") for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take longer than a minute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="longer than a minute: run with --slow"))
