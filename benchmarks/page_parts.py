"""What the pages of `ekd-compare`'s studies have in common: their runs, set-up, rows, differences, and notes."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ekd_lightning.reporting.comparison import Block, Row, Run
from ekd_lightning.reporting.estimates import Difference, paired, percent
from ekd_lightning.studies.plan import read_study
from ekd_lightning.studies.study_runs import RUNS, read_runs

NOTES = "<!-- notes -->"


def read_study_runs(parser: argparse.ArgumentParser, folder: Path) -> tuple[str, list[Run]]:
    """The data set of a study of `ekd-compare`, and its runs with their machines."""
    study = read_study(folder)
    if study is None:
        parser.error(f"{folder}: no study of ekd-compare")
    return study.data, with_machines(read_runs(study, folder), folder)


def with_machines(runs: Iterable[Run], folder: Path) -> list[Run]:
    """The runs of a study, each with `machine`, `threads` and `torch` in its result."""

    def told(run: Run) -> Run:
        if run.result is None:
            return run
        made = json.loads((folder / RUNS / run.name / "provenance.json").read_text())
        hardware = made["hardware"]
        machine = f"{hardware['cpu']} ({hardware['cpu_capability']})"
        own = {"machine": machine, "threads": hardware["threads"], "torch": made["packages"]["torch"]}
        return replace(run, result={**run.result, **own})

    return [told(run) for run in runs]


def kept_notes(page: Path) -> str:
    """What stands in an existing page between the two marks."""
    parts = page.read_text().split(NOTES) if page.is_file() else []
    return parts[1] if len(parts) == 3 else ""


def difference(one: Row, other: Row) -> Difference | None:
    """One row minus another, paired by seed."""
    ours, theirs = ({r["seed"]: float(r["test_accuracy"]) for r in row.done} for row in (one, other))
    common = sorted(ours.keys() & theirs.keys())
    return paired([ours[seed] - theirs[seed] for seed in common]) if common else None


def interval(found: Difference | None) -> str:
    """Points with the 95 % interval."""
    if found is None:
        return "–"
    mean = f"{100 * found.mean:+.2f}"
    if found.half is None:
        return f"{mean} (n {found.n}: not enough runs)"
    low, high = (100 * (found.mean + sign * found.half) for sign in (-1, 1))
    return f"{mean} [{low:+.2f}, {high:+.2f}]"


def shown(row: Row, reference: str) -> str:
    """The difference to a reference of the block, with Holm's p."""
    found = row.differences.get(reference)
    if row.name == reference:
        return ""
    p = found.p_holm if found else None
    return interval(found) + (f", p {max(p, 0.001):.3f}" if p is not None else "")


def table(rows: Sequence[Row]) -> str:
    """A family, the best first."""
    heads = ("row", "K", "M", "test accuracy %", "n", "− ce", "− ekd", "parameters", "MACs", "")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in sorted(rows, key=lambda r: -(r.accuracy.mean if r.accuracy else -1)):
        first = row.done[0] if row.done else {}
        cells = [
            f"`{row.name}`",
            *(str(first.get(key, "–")) for key in ("num_branches", "num_teachers")),
            percent(row.accuracy),
            str(len(row.done)),
            shown(row, "ce"),
            shown(row, "ekd"),
            f"{first['num_parameters']:,}" if first else "–",
            f"{first['macs'] / 1e6:.1f} M" if first else "–",
            row.problems,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def side(found: Difference | None) -> str:
    """above, below or unclear: whether the 95 % interval leaves 0 out."""
    if found is None or found.half is None:
        return "not enough runs"
    if abs(found.mean) <= found.half:
        return "unclear"
    return "above" if found.mean > 0 else "below"


def named(rows: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(f"`{name}`" for name in rows) or "none"


def bullets(lines: Iterable[str]) -> str:
    """A list, wrapped."""
    return "\n".join(textwrap.fill(f"- {line}", 115, subsequent_indent="  ") for line in lines)


def made_on(block: Block) -> str:
    """The processors of a block's runs; where there are several, which runs are those of the lesser ones."""
    runs: dict[str, list[str]] = {}
    for row in block.rows:
        for place in row.distinct("machine"):
            seeds = [str(r["seed"]) for r in row.done if r["machine"] == place]
            whole = len(seeds) == len(row.done)
            runs.setdefault(place, []).append(
                f"`{row.name}`" + ("" if whole else f" seed {', '.join(seeds)}")
            )
    first, *others = sorted(runs, key=lambda place: -len(runs[place]))
    if not others:
        return first
    rest = "; ".join(f"{place} for {', '.join(runs[place])}" for place in others)
    return f"{first}; {rest}, so differences between these rows and others are also ones of machines (see the end)"


def setup(block: Block, weights: str) -> str:
    """What was run, on what, as the records of runs from `with_machines` say."""
    done = [(row, result) for row in block.rows for result in row.done]
    first = done[0][1]
    taught = max((result for _, result in done), key=lambda r: len(r["teachers"]))
    threads = sorted({result["threads"] for _, result in done})
    versions = sorted({f"torch {result['torch']}" for _, result in done})
    seeds = sorted({result["seed"] for _, result in done})
    teachers = ", ".join(f"`{t['id']}` ({100 * t['test_accuracy']:.2f} %)" for t in taught["teachers"])
    lines = (
        f"**Data**: {block.data}, {first['num_train_images']:,} training and {first['num_val_images']:,} validation "
        f"images (subset `{first['subset_sha256'][:12]}`, the same for all runs); each run reads the test set once, "
        "at its end.",
        f"**Teachers**: {teachers}. They were trained by others on all training images, so also on those that the "
        "students must not see, and are right on nearly all validation images.",
        f"**Steps**: {first['epochs']} epochs of batch {first['batch_size']}, {first['steps']:,} steps for every run, "
        f"{first['precision']}. Short, because it ran on a processor: all students would gain from more, and the "
        "order of the methods may change with them.",
        f"**Weights** of the losses: {weights}.",
        f"**Seeds**: {', '.join(map(str, seeds))}; at one seed all rows see the same images in the same order.",
        f"**Hardware**: {made_on(block)}; runs of {'/'.join(map(str, threads))} thread(s); {', '.join(versions)}.",
    )
    return bullets(lines)
