"""Pages of studies: one for each data set, and a first one that answers whether EKD is ahead at equal cost."""

from __future__ import annotations

import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ekd_lightning import markdown as md
from ekd_lightning.files import write_text
from ekd_lightning.reporting import setups, tables
from ekd_lightning.reporting.answer import SAME_COST
from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.estimates import (
    SIGNIFICANCE,
    Difference,
    corrected,
    interval_text,
    listed,
    minus,
    p_text,
    percent,
    plural,
    share,
)
from ekd_lightning.reporting.groups import Group
from ekd_lightning.reporting.report import Report, kind_of_machine
from ekd_lightning.runs.collection import RECORDS, RunEntry
from ekd_lightning.runs.protocol import Protocol

LIMITED = 0.2
"""Shares of the training images up to this are limited data."""
SUBJECTS = ("ekd", "ekd_maps")
"""Methods that stand for EKD; its other variants are ablations."""
SIDES = ("below", "level", "above", "too few runs")
_COLUMNS = (*("K", "M", "n", "test accuracy % [95 % interval]", "differences", "NLL", "parameters", "MACs"), "not done")
_PROTOCOL = ("epochs", "steps", "batch_size", "precision", "num_train_images", "num_val_images", "subset_sha256")
_KEPT_LISTS = ("teachers", "chain", "test_branch_accuracy", "pool_teachers", "assistants", "tags", "assignment")
_TEACHER = ("id", "sha256", "test_accuracy", "teachers_sha256")


class Standing(NamedTuple):
    """Where a row of EKD stands in its block.

    Attributes:
        block: The block.
        ekd: The row.
        against: EKD minus each other method that costs no more, by label; p values are corrected for their number, or
            where rows decide, for the number of those.
        best: The most accurate of these, None without any.
    """

    block: Block
    ekd: Group
    against: dict[str, Difference]
    best: Group | None

    def side(self, label: str) -> str:
        """One of `SIDES`: on which side of 0 the 95 % interval of the paired difference lies."""
        found = self.against.get(label)
        if found is None or found.half is None:
            return "too few runs"
        return "level" if abs(found.mean) <= found.half else "above" if found.mean > 0 else "below"


def standings(block: Block) -> list[Standing]:
    """Each row of EKD against all other methods with at most 5 % more MACs; variants of EKD are no other methods."""
    found = []
    for ekd in (one for one in block.done if one.method in SUBJECTS):
        most = (ekd.mean("macs") or 0.0) * (1 + SAME_COST)
        others = [g for g in block.done if not g.method.startswith("ekd") and (g.mean("macs") or 0.0) <= most]
        ours = ekd.by_seed("test_accuracy")
        plain = {one.label: minus(ours, one.by_seed("test_accuracy")) for one in others}
        decide = {one.label: plain[one.label] for one in others if one.decides}
        best = max(others, key=lambda one: one.mean("test_accuracy") or 0.0, default=None)
        found.append(Standing(block, ekd, {**corrected(plain), **corrected(decide)}, best))
    return found


def lead(found: Sequence[Standing]) -> str:
    """The answer in a sentence: is EKD ahead at equal cost, with limited data?"""
    limited = [one for one in found if (one.block.fraction or 1.0) <= LIMITED and one.best]
    counts = Counter(one.side(one.best.label) for one in limited if one.best)
    tested = len(limited) - counts["too few runs"]
    if not tested:
        return "Whether EKD is ahead at equal cost with limited data is open: no comparison has enough runs."
    start = "is" if counts["above"] == tested else "is not" if not counts["above"] else "is sometimes"
    parts = ", ".join(f"{side} in {counts[side]}" for side in ("below", "level", "above"))
    return (
        f"With at most {100 * LIMITED:g} % of the labels EKD {start} ahead at equal cost: against the best other "
        f"method that costs no more it is {parts} of {plural(tested, 'comparison')} (95 % intervals, paired by seed)."
    )


def _worth(one: Standing) -> tuple[Any, ...]:
    return (one.block.data, one.block.fraction or 1.0, one.block.key, one.ekd.label)


def summary_page(report: Report, missing: Sequence[str] = ()) -> str:
    """README.md of the pages.

    Args:
        report: All records.
        missing: Lines on what was not run.
    """
    found = sorted((one for block in report.blocks for one in standings(block)), key=_worth)
    rows = [
        (
            md.Markdown(f"[{one.block.data}, {100 * (one.block.fraction or 1):g} %]({one.block.data}.md)"),
            one.block.protocol.steps,
            md.code(one.ekd.label),
            percent(one.ekd.accuracy) if one.ekd.accuracy else "",
            f"{(one.ekd.mean('macs') or 0) / 1e6:.1f} M",
            md.code(one.best.label) if one.best else "–",
            percent(one.best.accuracy) if one.best and one.best.accuracy else "",
            interval_text(one.against.get(one.best.label)) if one.best else "",
            one.side(one.best.label) if one.best else "",
        )
        for one in found
    ]
    heads = (
        "data",
        "steps",
        "row",
        "test accuracy %",
        "MACs",
        "best other at no more cost",
        "its %",
        "EKD minus it",
        "",
    )
    pages = sorted({block.data for block in report.blocks})
    not_run = f"## Not run\n\n{_bullets(missing)}" if missing else ""
    return (
        f"""# Is EKD ahead at equal cost?

{_filled(lead(found))}

{md.table(heads, rows)}
Every row of EKD is compared with every other method that costs at most {100 * SAME_COST:g} % more multiply-accumulates.
Differences are in points, paired by seed, with their 95 % interval. The best other method is picked by its test
accuracy, which flatters it; the pages correct p values for all comparisons. The runs of one line share data, images,
views, number of steps and precision; other lines differ in them, and say nothing of each other.

Pages: {", ".join(f"[{data}]({data}.md)" for data in pages)}. Made by `ekd-report` from the records beside this page:

```bash
make study-pages
```
{not_run.strip()}
""".rstrip()
        + "\n"
    )


def data_page(report: Report, data: str, figures: Mapping[str, str], about: Mapping[str, str]) -> str:
    """The page of a data set.

    Args:
        report: All records.
        data: Name of the data set.
        figures: Path of the figure of accuracy and cost, by the key of the block.
        about: What studies say of themselves, by their name.
    """
    blocks = [block for block in report.blocks if block.data == data]
    found = [one for block in blocks for one in standings(block)]
    parts = [f"# {data}\n", _filled(lead(found)) + "\n", _LEGEND]
    for block in blocks:
        parts += [f"## {md.prose(block.title)}\n", _protocol(block, about)]
        parts += [_standing_words(one) for one in standings(block)]
        if block.key in figures:
            parts.append(md.image(figures[block.key], "Test accuracy against cost, with 95 % intervals") + "\n")
        best = sorted(report.rows[block.key], key=lambda row: -(row.group.mean("test_accuracy") or 0.0))
        parts.append(tables.markdown(best, _COLUMNS))
    return "\n".join(parts)


_LEGEND = """\
Accuracies in percent with the weights after the last epoch: mean ± sample standard deviation over n seeds. Differences
in points, paired by seed, with the 95 % t interval; p of the paired t-test, after Holm's correction. K branches, M
teachers. *Below*, *level* and *above* say where the interval of a difference lies; with few seeds a corrected p value
shows large differences only.
"""


def _filled(text: str) -> str:
    return textwrap.fill(text, 120)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(textwrap.fill(f"- {line}", 120, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def _protocol(block: Block, about: Mapping[str, str]) -> str:
    """What the runs of a block share, and where they were made."""
    one = block.protocol
    runs = [run for group in block.groups for run in group.done]
    lines = [
        f"{one.num_train_images or 0:,} training and {one.num_val_images or 0:,} validation images (subset "
        f"`{(one.subset_sha256 or 'unknown')[:12]}`); {one.epochs} epochs of batch {one.batch_size}, "
        f"{one.steps or 0:,} steps, {one.precision}."
    ]
    if block.teachers:
        known = [f"{md.code(t['id'])} ({share(t['test_accuracy'])} %)" for t in block.teachers if "id" in t]
        lines.append(f"Teachers: {', '.join(known)}.")
    lines += [f"{md.code(name)}: {about[name]}" for name in sorted({run.study or "" for run in runs}) if name in about]
    lines.append(_made_on(block.done))
    return _bullets(lines) + "\n"


def _made_on(groups: Sequence[Group]) -> str:
    """The machines of all runs; where there are several kinds, which rows are of the rarer ones."""
    runs: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        kinds = {int(run.get("seed")): kind_of_machine(run.provenance) for run in group.done}
        for kind in dict.fromkeys(kinds.values()):
            own = [str(seed) for seed, other in kinds.items() if other == kind]
            runs[kind].append(md.code(group.label) + ("" if len(own) == group.n else f" seed {', '.join(own)}"))
    first, *others = sorted(runs, key=lambda kind: -len(runs[kind]))
    if not others:
        return f"Made on {first}."
    rest = "; ".join(f"{kind} for {', '.join(runs[kind])}" for kind in others)
    return f"Made on {first}; {rest}: these rows differ from the others in the machine, too."


def _standing_words(one: Standing) -> str:
    """Where a row of EKD is below, level and above."""
    lines = []
    for side in SIDES:
        own = sorted((label for label in one.against if one.side(label) == side), key=lambda n: one.against[n].mean)
        if own:
            lines.append(f"{side}: {'; '.join(f'{md.code(n)} {_difference(one.against[n])}' for n in own)}")
    sure = [n for n, d in one.against.items() if d.half is not None and (d.tested or 1.0) < SIGNIFICANCE]
    lines.append(f"p below {SIGNIFICANCE:g} after Holm's correction: {listed([md.code(n) for n in sure]) or 'none'}")
    accuracy = percent(one.ekd.accuracy) if one.ekd.accuracy else ""
    cost = f"{(one.ekd.mean('macs') or 0) / 1e6:.1f} M MACs"
    head = f"**{md.code(one.ekd.label)}**, {accuracy} % at {cost}, against methods that cost no more:"
    return f"{head}\n\n{_bullets(lines)}\n"


def _difference(found: Difference) -> str:
    tested = "" if found.tested is None or found.half is None else f", {p_text(found.tested)}"
    return f"{interval_text(found)}{tested}"


_README = {
    "ce": "labels alone (`ce`)",
    "kd_mean": "plain distillation (`kd_mean`)",
    "kd_mean_macs": "plain distillation, larger student (`kd_mean_macs`)",
    "kd_mean_feature_macs": "the same, imitating features, too (`kd_mean_feature_macs`)",
    "ekd": "**EKD** (`ekd`)",
}
"""Rows of the README's table that a block may have, and what they are called there."""


def readme_section(report: Report, folder: str) -> str:
    """The README's table: of limited data, the block with most rows; whoever is best at no more cost is named.

    Args:
        report: All records.
        folder: That of the pages, from the README.
    """
    found = [one for block in report.blocks for one in standings(block)]
    whole = [one for one in found if (one.block.fraction or 1.0) <= LIMITED and one.best]
    if not whole:
        return "No study with limited data is done.\n"
    one = max(whole, key=lambda s: (len(s.block.done), s.ekd.label == "ekd", s.ekd.label))
    block, best = one.block, one.best
    assert best is not None
    groups = {group.label: group for group in block.done}
    named = {**_README, one.ekd.label: _README.get(one.ekd.label, f"**EKD** ({md.code(one.ekd.label)})")}
    named.setdefault(best.label, f"the best other method at no more cost ({md.code(best.label)})")
    rows = [
        (
            md.Markdown(called),
            percent(groups[label].accuracy) if groups[label].accuracy else "",
            f"{(groups[label].mean('macs') or 0) / 1e6:.1f} M",
            f"{(groups[label].mean('num_parameters') or 0) / 1e3:.0f} k",
        )
        for label, called in named.items()
        if label in groups
    ]
    intro = (
        f"{100 * (block.fraction or 1):g} % of {block.data}'s labels, {len(block.teachers)} pretrained teachers, "
        f"{block.protocol.steps or 0:,} steps, mean ± standard deviation over {one.ekd.n} seeds; all {len(groups)} "
        f"rows, and the other studies, are in [{folder}]({folder}/README.md)."
    )
    cost = (best.mean("macs") or 0) / (one.ekd.mean("macs") or 1)
    said = (
        f"**{lead(found)}** Here the best other method, "
        f"{md.code(best.label)}, has {100 * cost:.0f} % of EKD's cost; EKD minus it is "
        f"{interval_text(one.against.get(best.label))} points."
    )
    table = md.table(("method", "test accuracy %", "MACs", "parameters"), rows)
    return f"{_filled(intro)}\n\n{table}\n{_filled(said)}\n\n"


def record_lines(study: str, runs: Sequence[RunEntry], about: str = "") -> list[str]:
    """Lines of a file of records, see `read_records`: what all runs share once, and a line for each run.

    Args:
        study: Its name.
        runs: That are done, with their rows.
        about: What the study is, for the page.
    """
    every = [_record(run) for run in runs]
    shared: dict[str, Any] = {"study": study, **({"about": about} if about else {})}
    if not all(run.decides for run in runs):
        shared["decide"] = sorted({str(run.row) for run in runs if run.decides})
    for part in ("result", "config", "provenance"):
        first = every[0][part]
        shared[part] = {k: v for k, v in first.items() if all(k in one[part] and one[part][k] == v for one in every)}
        for one in every:
            one[part] = {k: v for k, v in one[part].items() if k not in shared[part]}
    return [json.dumps(one, allow_nan=False) for one in (shared, *every)]


def _record(run: RunEntry) -> dict[str, Any]:
    """A run as its record keeps it: numbers and words, no curves, predictions or matrices; no place or host."""
    result = {}
    for key, value in (run.result or {}).items():
        if key in ("teachers", "chain"):
            result[key] = [{k: one[k] for k in _TEACHER if k in one} for one in value or []]
        elif value is not None and (key in _KEPT_LISTS or not isinstance(value, list | dict)):
            result[key] = value
    hardware, packages = run.provenance.get("hardware") or {}, run.provenance.get("packages") or {}
    kept = {key: hardware.get(key) for key in ("cpu", "cpu_capability", "gpus", "threads")} if hardware else {}
    provenance = {"hardware": kept, "packages": {"torch": packages.get("torch")}} if hardware else {}
    config = setups.settings(run)
    if options := run.setting("student.options"):
        config |= {f"student.options.{key}": value for key, value in options.items()}
    return {"row": run.row, "time": run.time, "result": result, "config": config, "provenance": provenance}


def write_records(runs: Sequence[RunEntry], folder: Path, about: Mapping[str, str]) -> list[Path]:
    """Writes a file of records for each data set, all its studies in it.

    Args:
        runs: That are done; those without a row are left out.
        folder: Where they are written, `<data>.jsonl`.
        about: What studies are, by their name.
    """
    found: dict[str, dict[tuple[str, str], list[RunEntry]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (run.study or "", run.name)):
        if run.row is not None and run.result is not None:
            protocol = json.dumps(asdict(Protocol.of(run)), sort_keys=True)
            found[str(run.get("data"))][str(run.study), protocol].append(run)
    paths = []
    for data, studies in found.items():
        lines = [line for (study, _), own in studies.items() for line in record_lines(study, own, about.get(study, ""))]
        paths.append(folder / f"{data}{RECORDS}")
        write_text(paths[-1], "\n".join(lines) + "\n")
    return paths


def read_about(paths: Iterable[Path]) -> dict[str, str]:
    """What studies say of themselves in files of records, by their name."""
    heads = [
        json.loads(line) for path in paths for line in path.read_text().splitlines() if line.startswith('{"study"')
    ]
    return {head["study"]: head["about"] for head in heads if "about" in head}


def write_pages(report: Report, folder: Path, about: Mapping[str, str], missing: Sequence[str] = ()) -> list[Path]:
    """Writes README.md, a page for each data set, and the figures of accuracy and cost."""
    from ekd_lightning.reporting import figure_style as fs  # noqa: PLC0415 (needs matplotlib)
    from ekd_lightning.reporting.figures import by_cost  # noqa: PLC0415

    files, shown = [], {}
    keys = {fs.file_name(fs.COST_FIGURE, block.key): block.key for block in report.blocks}
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    with fs.style():
        for drawn in by_cost(report, fs.LineStyles(report.ordered_labels)):
            (path,) = fs.save(drawn.figure, folder / "figures" / drawn.name, ["svg"])
            files.append(path)
            shown[keys[drawn.name]] = f"figures/{path.name}"
    pages = {data: data_page(report, data, shown, about) for data in sorted({b.data for b in report.blocks})}
    for name, text in {**pages, "README": summary_page(report, missing)}.items():
        files.append(folder / f"{name}.md")
        write_text(files[-1], text)
    return files
