"""Shared parts of the pages of `ekd-compare`'s studies: runs, set-up, rows, differences, and notes."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ekd_lightning.reporting import tables
from ekd_lightning.reporting.estimates import TOO_FEW, Difference, corrected, minus
from ekd_lightning.reporting.tables import Row
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.studies.comparison import Runs, read_runs
from ekd_lightning.studies.study import read_study

NOTES = "<!-- notes -->"
COLUMNS = ("K", "M", "test accuracy % [95 % interval]", "n", "differences", "parameters", "MACs", "not done")


def read_study_runs(parser: argparse.ArgumentParser, folder: Path) -> tuple[str, float, Runs]:
    """The data set of a study of `ekd-compare`, its one fraction, and its runs with their machines."""
    study = read_study(folder)
    if study is None:
        parser.error(f"{folder}: no study of ekd-compare")
    if len(study.fractions) != 1:
        parser.error(f"{folder}: several fractions, and a page is about one")
    (fraction,) = study.fractions
    runs = read_runs(study, folder)[fraction]
    told = {row: {seed: with_machine(run) for seed, run in own.items()} for row, own in runs.items()}
    return study.data, fraction, told


def with_machine(run: RunEntry) -> RunEntry:
    """The run with `machine`, `threads` and `torch` in its result."""
    if run.result is None:
        return run
    hardware = run.provenance["hardware"]
    machine = f"{hardware['cpu']} ({hardware['cpu_capability']})"
    own = {"machine": machine, "threads": hardware["threads"], "torch": run.provenance["packages"]["torch"]}
    return replace(run, result=run.result.having(**own))


def kept_notes(page: Path) -> str:
    """What stands in an existing page between the two marks."""
    parts = page.read_text().split(NOTES) if page.is_file() else []
    return parts[1] if len(parts) == 3 else ""


def difference(one: Row, other: Row) -> Difference | None:
    """One row minus another, paired by seed."""
    ours, theirs = (row.group.by_seed("test_accuracy") for row in (one, other))
    return corrected({0: minus(ours, theirs)}).get(0)


def table(rows: Sequence[Row]) -> str:
    """A family, the best first."""
    best = sorted(rows, key=lambda row: -(row.group.accuracy.mean if row.group.accuracy else -1))
    return tables.markdown(best, COLUMNS).strip()


def side(found: Difference | None) -> str:
    """above, below or unclear: whether the 95 % interval leaves 0 out."""
    if found is None or found.half is None:
        return TOO_FEW
    if abs(found.mean) <= found.half:
        return "unclear"
    return "above" if found.mean > 0 else "below"


def named(rows: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(f"`{name}`" for name in rows) or "none"


def bullets(lines: Iterable[str]) -> str:
    """A list, wrapped."""
    return "\n".join(textwrap.fill(f"- {line}", 115, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def made_on(rows: Sequence[Row]) -> str:
    """The processors of all runs; where there are several, which runs are those of the lesser ones."""
    runs: dict[str, list[str]] = {}
    for group in (row.group for row in rows):
        for place in group.distinct("machine"):
            seeds = [str(run.get("seed")) for run in group.done if run.get("machine") == place]
            whole = len(seeds) == group.n
            runs.setdefault(place, []).append(f"`{group.label}`" + ("" if whole else f" seed {', '.join(seeds)}"))
    first, *others = sorted(runs, key=lambda place: -len(runs[place]))
    if not others:
        return first
    rest = "; ".join(f"{place} for {', '.join(runs[place])}" for place in others)
    return f"{first}; {rest}, so these rows differ from the others in the machine, too"


def setup(data: str, rows: Sequence[Row], weights: str) -> str:
    """What was run, on what, as the records of runs from `with_machine` say."""
    done = [run.result or {} for row in rows for run in row.group.done]
    first = done[0]
    taught = max(done, key=lambda result: len(result["teachers"]))
    threads = sorted({result["threads"] for result in done})
    versions = sorted({f"torch {result['torch']}" for result in done})
    seeds = sorted({result["seed"] for result in done})
    teachers = ", ".join(f"`{t['id']}` ({100 * t['test_accuracy']:.2f} %)" for t in taught["teachers"])
    lines = (
        f"**Data**: {data}, {first['num_train_images']:,} training and {first['num_val_images']:,} validation "
        f"images (subset `{first['subset_sha256'][:12]}`, the same for all runs); each run reads the test set once, "
        "at its end.",
        f"**Teachers**: {teachers}. These published networks have seen all training images, including those that the "
        "students do not see, and classify nearly all validation images correctly.",
        f"**Steps**: {first['epochs']} epochs of batch {first['batch_size']}, {first['steps']:,} steps for every run, "
        f"{first['precision']}. A short schedule for a CPU: every student would gain from more steps, and the "
        "order of the methods may change.",
        f"**Weights** of the losses: {weights}.",
        f"**Seeds**: {', '.join(map(str, seeds))}; at one seed all rows see the same images in the same order.",
        f"**Hardware**: {made_on(rows)}; runs of {'/'.join(map(str, threads))} thread(s); {', '.join(versions)}.",
    )
    return bullets(lines)
