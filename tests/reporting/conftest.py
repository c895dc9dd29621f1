"""One study with everything on record, read once for all tests of figures and page."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich_runs import EVIL_NAME, write_hostile_study, write_rich_study

from ekd_lightning.reporting.report import Report, make_report
from ekd_lightning.runs.collection import collect


@pytest.fixture(scope="session")
def rich_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study."""
    return write_rich_study(tmp_path_factory.mktemp("rich") / "study")


@pytest.fixture(scope="session")
def rich_report(rich_study: Path) -> Report:
    """The report of the study."""
    return make_report(collect([rich_study]), title="Study <b>&</b> report")


@pytest.fixture(scope="session")
def hostile_report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a study whose names would all be markup."""
    return make_report(collect([write_hostile_study(tmp_path_factory.mktemp("hostile"))]), title=EVIL_NAME)
