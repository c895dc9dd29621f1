"""The page of what `ekd-bench` has measured: the tables that it prints, in Markdown, and how they were made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import fill
from typing import Any

from ekd_lightning import markdown as md

HEADS = ("what", "median", "min", "max", "ratio")
_PLAIN = """\
- **The plain loop** is the usual code with torchvision and a `DataLoader`: PIL transforms in workers, float32, every
  teacher in every step, with the same loss and student.
"""
_HOW = {
    "a": "Images per second of the loader, without training. Workers are those of the plain loop's `DataLoader`.",
    "b": "Images per second of each teacher, against its plain float32 form. Differences "
    "are those of log-probabilities on test images, between float32 and the format that a run would use.",
    "c": "Images per second of an epoch with all teachers and three branches. A cold table is empty at the start, a "
    "warm one holds all rows. Both train through Lightning with the callbacks and loggers of `ekd-train`, and compile "
    "teachers and student as a long run does, with kernels from torch's cache on disk.",
    "d": "Seconds of all jobs from an empty store, without their tests. Those of the plain loop are computed from its "
    "measured speed in each job.",
    "e": "Images per second, against the plain float32 ensemble of the teachers, by batch size. The plain form "
    "computes in float32, the others in the format named.",
    "f": "Gigabytes of resident memory at the peak of one epoch of `ekd-train`.",
    "g": "Images per second with warm tables.",
    "h": "Shares of the peak of a square matrix product, in the format named; a training step counts as three forward "
    "passes.",
    "i": "Images per second with the same kernels, tables and student, not compiled. The overhead is the share by "
    "which Lightning lengthens the time.",
    "l": "Images per second from JPEG files of 320×256 pixels, each once, in shuffled batches of 128 squares of 64 "
    "pixels. Every measurement is a process of its own; imports do not count. A cold cache decodes all files first, as "
    "the first run with a folder does; a warm cache is read, as later runs do. Memory is the resident peak, pages of "
    "the mapped cache included. The files lie in the operating system's cache throughout.",
    "p": "Shares of the operators' time in an epoch with warm tables and three branches, and the rate that its "
    "convolutions alone would have.",
}
"""Part -> what its numbers are."""


def rows(name: str, value: Any) -> Iterator[tuple[str, ...]]:
    """Yields the rows of a part's table, with cells as in `HEADS`; nested groups become rows."""
    if _is_rate(value):
        yield (name, *_rate(value))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from rows(_joined(name, key), inner)
    else:
        yield (name, _number(value), "", "", "")


def _is_rate(value: Any) -> bool:
    return isinstance(value, Mapping) and "median" in value


def _rate(value: Mapping[str, float]) -> tuple[str, ...]:
    return (*(f"{value[field]:,.0f}" for field in ("median", "min", "max")), f"{value['ratio']:.2f}")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _joined(name: str, key: str) -> str:
    return f"{name} {key}".strip() if key != "rates" else name


def _blocks(group: Mapping[str, Any], name: str = "") -> Iterator[str]:
    """Yields a group's numbers as a line or a row, its rates as a table, then the groups in it."""
    title = f"{md.prose(name)}: " if name else ""
    rates = {key: value for key, value in {**group, **group.get("rates", {})}.items() if _is_rate(value)}
    numbers = {key: _number(value) for key, value in group.items() if not isinstance(value, Mapping) and key != "unit"}
    if rates or not name:
        line = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in numbers.items())
        yield from [f"{title}{md.prose(line)}\n"] if title or line else []
        yield from [md.table(("", *HEADS[1:]), ((key, *_rate(value)) for key, value in rates.items()))] if rates else []
    elif numbers:
        yield md.table((name.replace("_", " "), *numbers), [("", *numbers.values())])
    for key, value in group.items():
        if isinstance(value, Mapping) and not _is_rate(value) and key != "rates":
            yield from _blocks(value, _joined(name, key))


def page(found: Mapping[str, Any], parts: Mapping[str, str], file: str) -> str:
    """Returns the page of what `ekd-bench` wrote to the JSON `file` beside it."""
    origin = found["origin"]
    hardware, packages = origin["hardware"], origin["packages"]
    devices = ", ".join(hardware["gpus"]) or "no GPU"
    commit = (origin.get("git") or {}).get("commit")
    software = f"torch {packages['torch']}, Lightning {packages['pytorch-lightning']}"
    plain = "" if found.keys() & parts.keys() == {"l"} else _PLAIN
    sections = "".join(
        f"\n## ({key}) {name[0].upper()}{name[1:]}\n\n{fill(_HOW[key], 120)}\n\n" + "\n".join(_blocks(found[key]))
        for key, name in parts.items()
        if key in found
    )
    return f"""# Speed, measured by `ekd-bench`

All numbers are in [`{file}`]({file}).

- **Hardware**: {hardware["cpu"]} ({hardware["cpu_capability"]}), {hardware["cpu_count"]} cores, {devices}
- **Software**: {software}{f", commit {commit[:10]}" if commit else ""}
- **Settings**: {md.code(found["settings"] or "the defaults")}
- **Variants** take turns, {found["rounds"]} counted rounds each. Rates are medians over the rounds, ratios medians of
  the ratios within a round.
{plain}{sections}"""
