"""One study with everything on record, read once for all tests of figures and page."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich_runs import write_rich_study

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
