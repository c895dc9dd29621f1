"""Which groups belong to one line or one grid of a figure: over fractions, over teachers and branches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.groups import Group
from ekd_lightning.reporting.report import Report

_COUNTS = ("K", "M", "teachers", "MACs", "parameters")
"""Settings that vary in a grid of teachers and branches, and what follows from them."""
_FIRST = ("ekd", "ce", "kd_mean", "branched_ce", "ekd_mean", "ekd_permuted")
"""Methods that have the clearest colours, as they are what others are held against."""
Family = tuple[Any, ...]


def family(block: Block) -> Family:
    """What blocks share that differ in the fraction alone: protocol, and teachers by name.

    By name and not by hash, as teachers that were trained on the subset are others at every fraction.
    """
    return (block.data, block.protocol.family, tuple(sorted(str(t.get("id")) for t in block.teachers)))


def families(blocks: Sequence[Block]) -> dict[Family, list[Block]]:
    """Blocks by family, those of one family by fraction."""
    found: dict[Family, list[Block]] = defaultdict(list)
    for block in blocks:
        if block.fraction is not None:
            found[family(block)].append(block)
    return {key: sorted(own, key=lambda block: block.fraction or 0.0) for key, own in found.items()}


def over_fractions(blocks: Sequence[Block]) -> dict[str, list[Group]]:
    """The groups of a family that make a line over fractions, by label: done at two fractions or more.

    Two blocks of a family may have the same fraction (other subsets); the one with more groups counts.
    """
    lines: dict[str, dict[float, Group]] = defaultdict(dict)
    for block in sorted(blocks, key=lambda block: -len(block.groups)):
        for group in block.groups:
            if group.n and block.fraction is not None:
                lines[group.label].setdefault(block.fraction, group)
    return {
        label: [points[fraction] for fraction in sorted(points)]
        for label, points in sorted(lines.items())
        if len(points) > 1
    }


def grid_name(group: Group) -> str:
    """The label of a group without its numbers of teachers and branches: what all cells of a grid share."""
    rest = {name: value for name, value in (group.varied or {}).items() if name not in _COUNTS}
    words = [f"{name}={value}" for name, value in rest.items() if value is not None and name != "student"]
    return ", ".join([group.method, *words])


def grids(block: Block) -> dict[str, dict[tuple[int, int], Group]]:
    """Groups by (teachers M, branches K), by what else sets them apart; only where M or K varies.

    Of several groups in one cell the one with more runs counts.
    """
    found: dict[str, dict[tuple[int, int], Group]] = defaultdict(dict)
    for group in sorted(block.groups, key=lambda group: -group.n):
        if group.n and group.num_teachers is not None and group.num_branches is not None:
            found[grid_name(group)].setdefault((group.num_teachers, group.num_branches), group)
    return {name: cells for name, cells in sorted(found.items()) if len(cells) > 1}


def ordered_labels(report: Report) -> list[str]:
    """All labels, in the order in which colours are given out: references and what matters first, then as they come."""
    labels = {group.label: group.method for block in report.blocks for group in block.groups}
    named = [label for block in report.blocks for label in report.references(block)]
    rank = {method: position for position, method in enumerate(_FIRST)}

    def order(label: str) -> tuple[int, int]:
        method = labels[label]
        plain = label == method and method in rank
        return (int(not plain and label not in named), rank.get(method, len(rank)))

    return sorted(labels, key=order)
