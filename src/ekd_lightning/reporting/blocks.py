"""Blocks of groups that may be compared, and the lines and grids of figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ekd_lightning.errors import UserError
from ekd_lightning.reporting.groups import Group, make_group, one_branch
from ekd_lightning.reporting.setups import needed, short, taught_by
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.protocol import ComparisonGroup, Protocol, Training, comparison_groups

SAME_COST = 0.05
"""Costs are equal if the MACs differ by at most this share."""
_COUNTS = ("K", "M", "teachers", "MACs", "parameters")
"""Settings that vary in a grid of teachers and branches, and those that follow from them."""
SAME_IN_A_ROW = (
    *("method", "student", "num_branches", "split_after", "ensemble", "temperature", "assignment", "assistants"),
    *("num_teachers", "num_parameters", "macs", "teacher_choice"),
)
"""Fields of a result that runs of one row must share, beside the weights of its terms."""


SUBJECTS = ("ekd", "ekd_pooled")
"""Methods that count as EKD, the default first; its other variants are ablations."""


@dataclass(frozen=True)
class Block:
    """Groups that may be compared with each other.

    Attributes:
        key: Short name for files and anchors, unique, e.g. `cifar10-f0.1`, `cifar10-f0.1-2`.
        title: E.g. `cifar10, 10 % of the training images`, with more words if several blocks share these.
        protocol: Of its groups; groups without results are in every block they may belong to.
        teachers: Records of the pool's teachers (`id`, `sha256`, `test_accuracy`, ...), in the order of the largest
            group. Every group was taught by some of them, or none.
        groups: In the order of `group`: method, K, M, label.
    """

    key: str
    title: str
    protocol: Protocol
    teachers: tuple[Mapping[str, Any], ...]
    groups: tuple[Group, ...]

    @property
    def done(self) -> list[Group]:
        """The groups with results."""
        return [group for group in self.groups if group.n]

    @property
    def others(self) -> list[Group]:
        """The groups with results of methods other than EKD and its variants."""
        return [group for group in self.done if not group.method.startswith("ekd")]

    def rivals(self, subject: Group) -> list[Group]:
        """The other methods that cost no more than the subject.

        If the subject has several branches, EKD with one branch counts as one of them.
        """
        most = (subject.mean("macs") or float("inf")) * (1 + SAME_COST)
        plain = [one for one in self.done if one.method in SUBJECTS and one.num_branches == 1]
        others = self.others + (plain if (subject.num_branches or 1) > 1 else [])
        return [group for group in others if (group.mean("macs") or 0.0) <= most]

    @property
    def data(self) -> str:
        """Name of the data set."""
        return self.protocol.data

    @property
    def fraction(self) -> float | None:
        """Share of the training images in (0, 1]; None if unknown (no run is done and none was set)."""
        return self.protocol.fraction


def cheaper_branch(whole: Group) -> Group | None:
    """`one_branch` of a group; None also where it costs as much as all branches, as a head does."""
    alone = one_branch(whole)
    costs = [(one.mean("macs") or 0.0) if one else 0.0 for one in (alone, whole)]
    return alone if costs[0] * (1 + SAME_COST) < costs[1] else None


def blocks(groups: Sequence[Group]) -> list[Block]:
    """Puts groups into blocks by data set, fraction, protocol and pool of teachers.

    A group without teachers is in the block of every pool.

    Returns:
        Blocks by data set and fraction, those with more groups first.
    """
    trainings = [
        Training(one.protocol, frozenset(one.taught_by), any(run.result is not None for run in one.runs))
        for one in groups
    ]
    alike: dict[tuple[str, float | None], list[ComparisonGroup]] = defaultdict(list)
    for place in sorted(
        comparison_groups(trainings),
        key=lambda p: (p.protocol.data, p.protocol.fraction or 0.0, -len(p.members), p.members[0]),
    ):
        alike[place.protocol.data, place.protocol.fraction].append(place)
    found: dict[str, Block] = {}
    for same in alike.values():
        for place in same:
            block = _block(place, [groups[p] for p in place.members], same, found)
            found[block.key] = block
    return [*found.values()]


def block_of_rows(
    data: str, fraction: float, rows: Mapping[str, Sequence[RunEntry]], deciding: Collection[str] | None = None
) -> Block:
    """The block of named rows, e.g. those of a study; each is one group. All rows decide if `deciding` is None.

    Raises:
        UserError: If two runs differ in their protocol.
    """
    check_comparable(rows)
    groups = tuple(make_group(runs, name, decides=deciding is None or name in deciding) for name, runs in rows.items())
    first = next((group for group in groups if group.n), groups[0])
    place = ComparisonGroup(replace(first.protocol, data=data, fraction=fraction), frozenset(), ())
    return _block(place, groups)


def check_comparable(rows: Mapping[str, Sequence[RunEntry]]) -> None:
    """Refuses rows whose runs differ in protocol, teachers or setting.

    All runs that are done must share the protocol. The pool of teachers must be the same for all that were taught by
    all of it; a method that was given one teacher must have it from this pool. Within a row, method, weights of the
    terms and networks must be the same, too.
    """
    done = {name: [run for run in runs if run.state == "done"] for name, runs in rows.items()}
    every = [run for runs in done.values() for run in runs]
    protocols = [Protocol.of(run) for run in every]
    for part in fields(Protocol):
        _same(every, part.name, [getattr(protocol, part.name) for protocol in protocols])
    for runs in done.values():
        weights = {key for run in runs for key in run.result or {} if key.startswith("weight_")}
        for key in (*SAME_IN_A_ROW, *sorted(weights)):
            _same(runs, key, [run.get(key) for run in runs])
    taught = [(run, hashes) for run in every if (hashes := taught_by(run.result or {}))]
    whole = [pair for pair in taught if pair[0].get("teacher_choice") not in ("best", "first")]
    _same([run for run, _ in whole], "teachers", [hashes for _, hashes in whole])
    for run, hashes in taught:
        if whole and not set(hashes) <= set(whole[0][1]):
            _refuse("teachers", run, whole[0][0], hashes, whole[0][1])


def _same(runs: Sequence[RunEntry], key: str, values: Sequence[Any]) -> None:
    for run, value in zip(runs, values, strict=True):
        if value != values[0]:
            _refuse(key, runs[0], run, values[0], value)


def _refuse(key: str, one: RunEntry, other: RunEntry, value: Any, different: Any) -> None:
    def brief(what: Any) -> str:
        return f"[{', '.join(map(brief, what))}]" if isinstance(what, list) else str(what)[:12]

    raise UserError(
        f"{one.name} and {other.name} differ in {key} ({brief(value)}, {brief(different)}): "
        "one table compares only runs of one protocol"
    )


def _block(
    place: ComparisonGroup, groups: Sequence[Group], same: Sequence[ComparisonGroup] = (), taken: Collection[str] = ()
) -> Block:
    """A block, named by what distinguishes it from others of the same data and fraction; its key is not taken."""
    protocol = place.protocol
    key, title = protocol.data, protocol.data
    if protocol.fraction is not None:
        key += f"-f{protocol.fraction:g}"
        title += f", {100 * protocol.fraction:.4g} % of the training images"
        title += "" if protocol.num_images is None else f" ({protocol.num_images:,})"
    title += "".join(f", {text}" for text in _distinction(place, same))
    key = next(one for one in (key, *(f"{key}-{n}" for n in range(2, len(taken) + 3))) if one not in taken)
    return Block(key, title, protocol, _teachers(groups), tuple(groups))


def _distinction(place: ComparisonGroup, same: Sequence[ComparisonGroup]) -> list[str]:
    """The fewest parts of protocol and teachers that distinguish a block from others of the same data and fraction."""

    def rank(name: str) -> tuple[bool, bool]:
        known = {getattr(other.protocol, name) for other in same} - {None}
        return len(known) < 2, name.endswith("sha256")  # hashes last: nobody can read them

    names = sorted((part.name for part in fields(Protocol)), key=rank)
    values = [{**vars(other.protocol), "teachers": sorted(other.pool)} for other in same]
    parts = []
    for name in needed([*names, "teachers"], values) if len(same) > 1 else []:
        if name == "teachers":
            text = " ".join(sha[:6] for sha in sorted(place.pool)) or "none"
        else:
            value = getattr(place.protocol, name)
            text = "unknown" if value is None else short(value)
        parts.append(f"{name.removesuffix('_sha256').removeprefix('num_').replace('_', ' ')} {text}")
    return parts


def _teachers(groups: Sequence[Group]) -> tuple[Mapping[str, Any], ...]:
    """Records of all teachers of the groups, each once, beginning with the largest pool."""
    found: dict[str, Mapping[str, Any]] = {}
    for one in sorted(groups, key=lambda one: -len(one.taught_by)):
        for run in one.done:
            for teacher in run.get("teachers") or []:
                if teacher.get("sha256") in one.taught_by:  # an assistant is none of the pool
                    found.setdefault(teacher["sha256"], teacher)
    return tuple(found.values())


def families(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks that differ in the fraction alone, by fraction; their teachers have the same names.

    Their hashes may differ, because teachers trained on the subset differ at every fraction.
    """
    found: dict[Any, list[Block]] = defaultdict(list)
    for block in blocks:
        if block.fraction is not None:
            names = tuple(sorted(str(teacher.get("id")) for teacher in block.teachers))
            found[block.protocol.family, names].append(block)
    return [sorted(own, key=lambda block: block.fraction or 0.0) for own in found.values()]


def over_fractions(blocks: Sequence[Block]) -> dict[str, list[Group]]:
    """The lines of a family over fractions, by label: groups that are done at two fractions or more.

    If two blocks have the same fraction (other subsets), the one with more groups counts.
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
    """The label of a group without its numbers of teachers and branches: the name of its grid."""
    rest = {name: value for name, value in group.varied.items() if name not in (*_COUNTS, "student")}
    return ", ".join([group.method, *(f"{name}={value}" for name, value in rest.items() if value is not None)])


def grids(block: Block) -> dict[str, dict[tuple[int, int], Group]]:
    """Groups by (teachers M, branches K), by the name of their grid; only grids with several cells.

    Of several groups in one cell the one with more runs counts.
    """
    found: dict[str, dict[tuple[int, int], Group]] = defaultdict(dict)
    for group in sorted(block.groups, key=lambda group: -group.n):
        if group.n and group.num_teachers is not None and group.num_branches is not None:
            found[grid_name(group)].setdefault((group.num_teachers, group.num_branches), group)
    return {name: cells for name, cells in sorted(found.items()) if len(cells) > 1}
