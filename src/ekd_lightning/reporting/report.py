"""The report of many runs: what is known of them, in one value, and the files that are written of it.

What draws and lays out gets a `Report` and nothing else:

    reporting.figures.write_figures(report: Report, folder: Path, formats: Sequence[str]) -> list[Path]
        Figures as `folder`/<name>.<format>; `formats` are of "svg" and "png". Returns what was written.
    reporting.page.write_page(report: Report, path: Path) -> None
        The self-contained HTML page.

Both are imported when they are needed: matplotlib and plotly are optional.
"""

from __future__ import annotations

from dataclasses import dataclass

from ekd_lightning.reporting.answer import Answer
from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.collection import Collection
from ekd_lightning.reporting.groups import Group


@dataclass(frozen=True)
class Report:
    """All that a report says.

    Attributes:
        title: Of the page.
        collection: The runs, and what was wrong with their files.
        groups: Runs that differ in their seed alone, by data set, fraction and label.
        blocks: Groups that may be compared.
        reference: Label that differences are taken to in the block of each key; blocks without one are absent.
        answers: The answer in words, one for each block with a run that is done.
        notes: One line each on what a reader has to know: files left out, duplicates, blocks kept apart.
    """

    title: str
    collection: Collection
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    reference: dict[str, str]
    answers: tuple[Answer, ...]
    notes: tuple[str, ...]
