"""`ekd-train` and `ekd-teach` called in this process, on a tiny task."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, Trainer

TINY = (
    "method=ekd_pooled",  # served by teacher tables
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
    "evaluation=none",  # tests that look at it ask for it
)
"""129 training images of the bundled digits, 4 steps an epoch, two teachers of one epoch, 360 test images."""


class FailsIfTaught(Callback):
    """Stops a run that has teachers as its training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.teachers is not None:
            raise RuntimeError("out of chalk")


@dataclass
class Outcome:
    """What a call left behind."""

    code: int
    out: str
    err: str
    directory: Path
    error: BaseException | None = None

    def json(self, name: str) -> dict[str, Any]:
        from ekd_lightning.files import read_json

        content = read_json(self.directory / name)
        content.pop("run", None)  # each run has its own
        return content

    @property
    def result(self) -> dict[str, Any]:
        return self.json("result.json")

    @property
    def status(self) -> dict[str, Any]:
        return self.json("status.json")


def call_train(*words: str, directory: Path) -> Outcome:
    """Calls `ekd-train` as the console script would, in the parent of the run's directory."""
    from ekd_lightning.cli.train import main

    return _call(main, ["ekd-train", *words], directory)


def call_teach(*words: str, directory: Path) -> Outcome:
    """The same for `ekd-teach`."""
    from ekd_lightning.cli.teach import main

    return _call(main, ["ekd-teach", *words], directory)


def _call(main: Callable[[], None], argv: list[str], directory: Path) -> Outcome:
    directory.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    out, err = io.StringIO(), io.StringIO()
    code, failure = 0, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
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


def called(main: Callable[[list[str]], None], *words: object, level: int = logging.WARNING) -> tuple[int, str, str]:
    """Calls a program with its arguments; exit code, standard output, and standard error with its log."""
    root = logging.getLogger()
    handlers, before, environment = list(root.handlers), root.level, dict(os.environ)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        root.handlers = [logging.StreamHandler(err)]
        root.setLevel(level)
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
    root.handlers, root.level = handlers, before
    os.environ.clear()
    os.environ.update(environment)
    return code, out.getvalue(), err.getvalue()
