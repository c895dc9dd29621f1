"""The world that is attacked, made once, and the counts of what was done to it."""

from __future__ import annotations

from collections import Counter

import pytest
from scenes import World

OUTCOMES: Counter[str] = Counter()
"""Attacks by what they were and how they ended."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("attacks")
    return World(root / "w", root / "kept")


@pytest.fixture(scope="session")
def outcomes() -> Counter[str]:
    return OUTCOMES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if OUTCOMES:
        terminalreporter.section("attacks")
        for name, count in sorted(OUTCOMES.items()):
            terminalreporter.write_line(f"{count:6}  {name}")
