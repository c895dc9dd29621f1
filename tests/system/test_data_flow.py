"""What a training passes through: files of the package with functions that run, as docs/architecture.md lists them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pytorch_lightning import Callback
from whole_runs import TINY, call_train

import ekd_lightning
from ekd_lightning.pipeline import run as pipeline_run

PACKAGE = Path(ekd_lightning.__file__).parent
ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"
PARTS = (
    "data/",
    "networks/",
    "methods/",
    "evaluation/",
    "settings.py",
    "training_settings.py",
    "keys.py",
    "roles.py",
    "files.py",
    "errors.py",
    "progress.py",
    "progress_lines.py",
)
"""What a setup builds from: which of these files run is up to the configuration."""


class Trace:
    """Names of the files in which functions of the package are called; modules that are imported do not count."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def __call__(self, frame, event, argument) -> None:
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and code.co_filename.startswith(str(PACKAGE)):
            self.files.add(Path(code.co_filename).relative_to(PACKAGE).as_posix())

    def start(self) -> None:
        self.files = set()
        sys.setprofile(self)

    def stop(self) -> set[str]:
        sys.setprofile(None)
        return self.files


class Watcher(Callback):
    """Ends the trace of the setup at the first step, and traces the second step of the second epoch."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.set_up, self.warm = trace, set[str](), set[str]()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        place = (trainer.current_epoch, batch_idx)
        if place == (0, 0):
            self.set_up = self.trace.stop()
        elif place == (1, 1):
            self.trace.start()
        elif place == (1, 2):
            self.warm = self.trace.stop()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of EKD on the digits whose teachers are trained and whose tables are filled: an earlier one saw to it."""
    folder = tmp_path_factory.mktemp("flow")
    words = (*TINY, "recipe.epochs=2", f"teachers.store={folder / 'store'}")
    assert call_train(*words, f"hydra.run.dir={folder / 'first'}", directory=folder / "first").code == 0
    trace = Trace()
    watcher, build = Watcher(trace), pipeline_run.build_trainer

    def build_watched(flags, directory, loggers, callbacks, **others):
        return build(flags, directory, loggers, [*callbacks, watcher], **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_run, "build_trainer", build_watched)
        trace.start()
        try:
            outcome = call_train(*words, f"hydra.run.dir={folder / 'run'}", directory=folder / "run")
        finally:
            trace.stop()
    assert outcome.code == 0, outcome.err
    return watcher


def listed(heading: str) -> list[str]:
    """The files that a section of the page names, e.g. `data/loader.py`."""
    section = ARCHITECTURE.read_text().split(f"\n### {heading}\n")[1].split("\n#")[0]
    return re.findall(r"`([a-z]+/[a-z_/]+\.py)`", section)


def test_a_warm_step_runs_in_the_files_that_the_page_lists(watched):
    assert watched.warm == set(listed("Files of a warm step"))
    assert len(watched.warm) <= 14


def test_a_setup_runs_in_the_files_that_the_page_lists(watched):
    orchestrating = {file for file in watched.set_up if not file.startswith(PARTS)}
    assert orchestrating == set(listed("Files of a setup"))
    assert len(orchestrating) <= 24
