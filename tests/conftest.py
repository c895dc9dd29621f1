"""What the tests of whole runs share."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from whole_runs import TINY, Outcome, call_train

hypothesis.settings.register_profile("any machine", deadline=None)  # a slow one is no failure
hypothesis.settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Half a million objects of the libraries live as long as the tests do: no collection looks at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher store that all runs share, so that the two tiny teachers are trained once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def train(store: Path) -> Callable[..., Outcome]:
    """`train(directory, *overrides)` runs the tiny task with the shared store."""

    def run(directory: Path, *overrides: str) -> Outcome:
        own = (f"teachers.store={store}", f"hydra.run.dir={directory}")
        return call_train(*TINY, *own, *overrides, directory=directory)

    return run


@pytest.fixture(scope="session")
def tiny_settings(store: Path) -> Callable[..., Any]:
    """`tiny_settings(*overrides)` composes the tiny task into typed settings, for tests below the command."""
    from hydra import compose, initialize_config_module

    from ekd_lightning.config.config import register_schema, to_settings

    def settings(*overrides: str) -> Any:
        register_schema()
        with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
            return to_settings(compose("train", overrides=[*TINY, f"teachers.store={store}", *overrides]))

    return settings


@pytest.fixture(scope="session")
def resume() -> Callable[..., Outcome]:
    """`resume(directory, *overrides)` continues a run."""

    def run(directory: Path, *overrides: str) -> Outcome:
        return call_train(f"resume={directory}", *overrides, directory=directory)

    return run
