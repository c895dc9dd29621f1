"""The world that is attacked, made once, and the counts of what was done to it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from scenes import World
from whole_runs import Outcome

OUTCOMES: Counter[str] = Counter()
"""Attacks by what they were and how they ended."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("attacks")
    return World(root / "w", root / "kept")


@pytest.fixture(scope="session")
def finished(train: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be left as it is."""
    outcome = train(tmp_path_factory.mktemp("finished") / "run", "method=branched_ce", "student.branches=2")
    assert outcome.code == 0, outcome.err
    return outcome.directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def outcomes() -> Counter[str]:
    return OUTCOMES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if OUTCOMES:
        terminalreporter.section("attacks")
        for name, count in sorted(OUTCOMES.items()):
            terminalreporter.write_line(f"{count:6}  {name}")
