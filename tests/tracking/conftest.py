"""One sweep of two runs with every logger, for all tests of what loggers get."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from whole_runs import TINY, Outcome, call_train


@pytest.fixture(autouse=True)
def _quiet_wandb(monkeypatch, tmp_path_factory):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path_factory.mktemp("wandb")))


@pytest.fixture(scope="session")
def swept(tmp_path_factory) -> Outcome:
    """Two jobs in one process: the first trains its teacher, too, and is evaluated; the second fails."""
    folder = tmp_path_factory.mktemp("loggers") / "day" / "time"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.delenv("WANDB_MODE", raising=False)
        words = ("logger=all", "logger.wandb.mode=offline", "evaluation=standard", "teachers.count=1", "seed=0")
        words += ("student.branches=2", "recipe.epochs=2", "recipe.lr=0.1,1e30")
        own = (f"teachers.store={folder.parent / 'store'}", f"hydra.sweep.dir={folder}")
        outcome = call_train("-m", *TINY, *words, *own, directory=folder)
        assert "WANDB_MODE" not in os.environ
    return outcome


@pytest.fixture(scope="session")
def ran(swept) -> Path:
    """The directory of the first job."""
    assert (swept.directory / "0" / "result.json").is_file(), swept.err
    return swept.directory / "0"
