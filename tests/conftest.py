"""What the tests of whole runs share: `ekd-train` called in this process, on a tiny task."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TINY = (
    "data.fraction=0.1",
    "data.eval_batch_size=120",
    "recipe.epochs=1",
    "recipe.batch_size=32",
    "+student.options={width: 0.5}",
    "teachers.pool=[{train: resnet8, options: {width: 0.5}, seed: 0}, {train: resnet8, seed: 1}]",
    "teachers.recipe.epochs=1",
    "teachers.recipe.batch_size=32",
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.limit_test_batches=1",
)
"""129 training images of the bundled digits, 4 steps an epoch, two teachers of one epoch, 120 test images."""


@dataclass
class Outcome:
    """What a call of `ekd-train` left behind."""

    code: int
    out: str
    err: str
    directory: Path
    error: BaseException | None = None

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.directory / name).read_text())

    @property
    def result(self) -> dict[str, Any]:
        return self.json("result.json")

    @property
    def status(self) -> dict[str, Any]:
        return self.json("status.json")


def call_train(*words: str, directory: Path) -> Outcome:
    """Calls `ekd-train` as the console script would, in the parent of the run's directory."""
    from ekd_lightning.cli.train import main

    directory.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    out, err = io.StringIO(), io.StringIO()
    code, failure = 0, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ekd-train", *words])
        patch.setenv("HYDRA_FULL_ERROR", "1")  # so that what the program sets is undone
        patch.chdir(directory.parent)
        before = dict(os.environ)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException as error:  # a traceback: exit code 1
                traceback.print_exc()
                code, failure = 1, error
        leaked = {name for name in os.environ if os.environ[name] != before.get(name)}
    root.handlers, root.level = handlers, level
    for name in leaked:
        os.environ.pop(name, None)
    return Outcome(code, out.getvalue(), err.getvalue(), directory, failure)


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

    from ekd_lightning.cli.config import register_schema, to_settings

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
