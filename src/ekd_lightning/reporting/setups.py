"""Settings of runs: which runs differ only in their seed, and the labels of their groups.

Settings of places and of how a run is carried out are ignored.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ekd_lightning.keys import is_free
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.protocol import Protocol, Training, comparison_groups

_RESULT = {
    "student": "student",
    "K": "num_branches",
    "M": "num_teachers",
    "split": "split_after",
    "ensemble": "ensemble",
    "T": "temperature",
    "assignment": "assignment",
    "assistants": "assistants",
    "teacher": "teacher_choice",
}
_DERIVED = ("teachers", "MACs", "parameters")
"""They follow from the other settings, unless one of those is not on record."""
_IN_RESULT = re.compile(
    r"(data|teachers|seed|student\.(network|branches|split_after|ensemble)"
    r"|method\.(name|temperature|assignment|teacher|assistants|terms\.[^.]+\.weight)"
    r"|trainer\.(precision|devices|num_nodes|max_epochs))(\.|$)"
)
"""Settings that results hold under other names; all others are only in the configuration."""
_MOST_NAMED = 3
"""If more settings differ, a label names only those that distinguish groups."""
_ALWAYS = ("student", "K", "M")
"""Settings that are named even with the usual value of a method."""
_PLAIN = ("split", "ensemble")  # mean nothing for one branch
_GRADIENTS = "student.branch_gradients"
"""Means nothing for one branch; earlier records lack it, and had `mean`."""
_UNKNOWN = "unknown settings"
_GROUP = re.compile(r"^(method\.terms\.|student\.options\.|recipe\.|method\.|trainer\.)")
"""Prefixes that labels leave out."""


def taught_by(result: Mapping[str, Any]) -> list[str]:
    """SHA-256 of the teachers from the pool; with assistants in between, of those that taught the first one."""
    chain = result.get("chain")
    if chain:
        return list(chain[0]["teachers_sha256"])
    return [teacher["sha256"] for teacher in result.get("teachers") or []]


def describe(run: RunEntry) -> dict[str, Any]:
    """Settings, flat: short names for those in results, dotted keys for those only in the configuration."""
    found = {name: run.get(field) for name, field in _RESULT.items()}
    if found["K"] == 1:
        found |= dict.fromkeys(_PLAIN)
    found["assistants"] = found["assistants"] or None
    result: Mapping[str, Any] = run.result or {}
    found |= {key.removeprefix("weight_"): value for key, value in result.items() if key.startswith("weight_")}
    chosen = result.get("teacher_choice") in ("best", "first")
    found["teachers"] = result.get("pool_teachers") if chosen else taught_by(result)
    found |= {"MACs": result.get("macs"), "parameters": result.get("num_parameters")}
    return {**found, **(settings(run) if run.config else {_UNKNOWN: True})}


def differences(one: RunEntry, other: RunEntry) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ, with both values; what only one has on record is left out."""
    ours, theirs = ({"method": run.get("method"), **describe(run)} for run in (one, other))
    pairs = {name: (ours.get(name), theirs.get(name)) for name in dict.fromkeys([*ours, *theirs])}
    if _UNKNOWN in pairs:
        pairs = {name: pair for name, pair in pairs.items() if name != _UNKNOWN and "." not in name}
    recorded = (*_RESULT, *_DERIVED, _GRADIENTS)
    return {
        name: pair for name, pair in pairs.items() if pair[0] != pair[1] and not (name in recorded and None in pair)
    }


def settings(run: RunEntry) -> dict[str, Any]:
    """Settings that are only in the configuration, by dotted keys, without nulls."""
    return {key: value for key, value in _settings(run).items() if not _IN_RESULT.match(key)}


def _settings(run: RunEntry) -> dict[str, Any]:
    """All settings that affect the results, by dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in run.config.items():
        _flatten(value, name, flat)
    if flat.get("student.branches", run.get("num_branches")) == 1:
        flat.pop(_GRADIENTS, None)
    elif flat:
        flat.setdefault(_GRADIENTS, "mean")
    return {key: value for key, value in flat.items() if not is_free(key, exact=False)}


def _flatten(value: Any, prefix: str, into: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(item, f"{prefix}.{key}", into)
    elif value is not None:
        into[prefix] = value


def key(run: RunEntry) -> str:
    """Equal for two runs with results that differ only in their seed."""
    protocol = vars(Protocol.of(run))
    return _text({"protocol": protocol, "method": run.get("method"), "setup": describe(run)})


def whole_key(run: RunEntry) -> str:
    """Equal for two runs, with or without a result, whose configurations differ only in their seed."""
    if not run.config:
        return _text({"name": run.name})
    return _text({key: value for key, value in _settings(run).items() if key != "seed"})


def _text(content: Any) -> str:
    return json.dumps(content, sort_keys=True, default=str)


def labels(groups: Sequence[Sequence[RunEntry]]) -> list[tuple[str, dict[str, Any]]]:
    """Names groups by their method and what varies within it.

    A setting is part of the label if it differs between comparable groups of the method; then it is in all labels of
    that method and data set, so that a label means the same everywhere. The most common student of a data set is not
    named. If more than `_MOST_NAMED` settings differ, a label names only those that differ from the usual value of the
    method and are needed to distinguish its groups.

    Returns:
        For each the label, and all settings that differ within its method.
    """
    firsts = [next((run for run in group if run.result is not None), group[0]) for group in groups]
    setups = [describe(run) for run in firsts]
    trainings = []
    for group, first in zip(groups, firsts, strict=True):
        taught = frozenset(sha for run in group for sha in taught_by(run.result or {}))
        trainings.append(Training(Protocol.of(first), taught, first.result is not None))
    usual = _usual_students(firsts)
    classes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position, run in enumerate(firsts):
        classes[trainings[position].protocol.data, str(run.get("method") or "unknown")].append(position)
    made: list[tuple[str, dict[str, Any]]] = [("", {})] * len(groups)
    for (data, method), members in classes.items():
        alike = comparison_groups([trainings[position] for position in members])
        near = [[members[p] for p in place.members] for place in alike]
        own = [setups[position] for position in members]
        varying = _varying(setups, near)
        common, named = {"student": usual[data]}, varying
        if len(varying) > _MOST_NAMED:
            common |= {name: _usual([setup.get(name) for setup in own]) for name in varying if name not in _ALWAYS}
            named = needed(varying, own)
        for position in members:
            varied = {name: setups[position].get(name) for name in varying}
            made[position] = (", ".join([method, *_label_words(varied, common, named)]), varied)
    for place in comparison_groups(trainings):  # number groups that differ in nothing on record
        seen: Counter[str] = Counter()
        for position in place.members:
            label, varied = made[position]
            seen[label] += 1
            if seen[label] > 1:
                made[position] = (f"{label} #{seen[label]}", varied)
    return made


def _usual_students(runs: Sequence[RunEntry]) -> dict[str, Any]:
    """The most frequent network of each data set; None if two are equally frequent."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        counts[Protocol.of(run).data][str(run.get("student"))] += 1
    usual = {}
    for data, count in counts.items():
        (first, most), *rest = count.most_common(2)
        usual[data] = None if rest and rest[0][1] == most else first
    return usual


def _label_words(varied: Mapping[str, Any], common: Mapping[str, Any], named: Sequence[str]) -> list[str]:
    """The settings of a group that its label names, without those with the common value; `…` stands for the rest."""
    special = {name: value for name, value in varied.items() if name not in common or value != common[name]}
    shown = {k: "none" if v is None and k in common else v for k, v in special.items() if k in named}
    return [*words(shown), *(["…"] if len(words(special)) > len(words(shown)) else [])]


def _usual(values: Sequence[Any]) -> Any:
    """The most frequent value; of equally frequent ones the first by its text."""
    counts = Counter(map(_text, values))
    most = min(counts, key=lambda text: (-counts[text], text))
    return next(value for value in values if _text(value) == most)


def needed(names: Sequence[str], setups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first names that distinguish as many setups as all of them."""

    def distinguished(some: Sequence[str]) -> int:
        return len({_text([setup.get(name) for name in some]) for setup in setups})

    remaining = list(names)
    for name in reversed(names):
        rest = [other for other in remaining if other != name]
        if distinguished(rest) == distinguished(names):
            remaining = rest
    return remaining


def _varying(setups: Sequence[Mapping[str, Any]], near: Sequence[Sequence[int]]) -> list[str]:
    """Names of the settings that differ among neighbours, and of as many derived ones as distinguish them."""
    names = dict.fromkeys(name for place in near for position in place for name in setups[position])
    found = [name for name in names if name not in _DERIVED and any(_varies(name, setups, p) for p in near)]
    for name in _DERIVED:
        unclear = [
            place
            for place in near
            if len({_text({one: setups[position].get(one) for one in found}) for position in place}) < len(place)
        ]
        if any(_varies(name, setups, place) for place in unclear):
            found.append(name)
    return found


def _varies(name: str, setups: Sequence[Mapping[str, Any]], place: Sequence[int]) -> bool:
    """Whether a setting differs in a place, among the runs that have it on record."""
    able = [setups[position] for position in place if "." not in name or _UNKNOWN not in setups[position]]
    values = [setup.get(name) for setup in able]
    if name in (*_RESULT, *_DERIVED, _GRADIENTS):
        values = [value for value in values if value is not None]
    return any(value != values[0] for value in values)


def words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as in labels, without those that a run does not have."""
    return [text for name, value in settings.items() if (text := _word(name, value))]


def _word(name: str, value: Any) -> str:
    if value is None or value == []:
        return ""
    if name == "student":
        return str(value)
    if name == _UNKNOWN:
        return "settings not recorded"
    if name == "teachers":
        value = "+".join(str(one)[:8] for one in value)
    return f"{_GROUP.sub('', name)}={short(value)}"


def short(value: Any) -> str:
    """A value in a label or a title; of a hash the first digits."""
    if isinstance(value, float):
        return f"{value:g}"
    text = json.dumps(value, separators=(",", ":")) if isinstance(value, (list, dict)) else str(value)
    return text[:8] if len(text) == 64 else text
