"""Files of a report: tables in Markdown, one tidy CSV of all runs, a summary in JSON, figures and the page."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ekd_lightning import markdown as md
from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError, UnwritableFileError, distinct_name, move_folder, read_json, write_text
from ekd_lightning.reporting import setups, tables
from ekd_lightning.reporting.figure_style import COST_FIGURE, file_name
from ekd_lightning.reporting.report import Report, kind_of_machine, summary
from ekd_lightning.runs.collection import RECORDS, RunEntry, read_records, record_name
from ekd_lightning.runs.lock import check_directory
from ekd_lightning.runs.protocol import Protocol

PAGE, FIGURES, RUNS, TABLES, SUMMARY = "index.html", "figures", "runs.csv", "tables.md", "summary.json"
SUMMARY_PAGE = "README.md"
MADE_BY = "Made by `ekd-report` from the records beside this page:"
PAGE_BEGINS = "Accuracies in percent with the weights after the last epoch"
"""Pages of studies: name of the first page, a text in it, and a text in every other page, by which they are known."""
_KEPT_LISTS = (
    *("teachers", "chain", "pool_teachers", "assistants", "tags", "assignment"),
    *("test_branch_accuracy", "val_branch_accuracy"),
)
_TEACHER = ("id", "sha256", "test_accuracy", "teachers_sha256")
_SUFFIXES = (".svg", ".png", ".html", ".md", ".csv", ".json")


def check_output(folder: Path, *, force: bool, marked: bool = True) -> None:
    """Refuses a folder that is not empty, unless it holds a report that may be replaced.

    An earlier report must be `marked`: it is recognised by its summary.

    Raises:
        UserError: If it is a file, or not empty without `force`, or not empty and no report.
    """
    if not folder.exists():
        return check_directory(folder)
    if not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; give a folder")
    if not any(folder.iterdir()):
        return
    if not force:
        raise UserError(f"--output {folder}: is not empty; --force writes over an earlier report")
    if marked and not (folder / SUMMARY).is_file():
        raise UserError(f"--output {folder}: is not empty and holds no report (no {SUMMARY}); give another folder")


def write_report(report: Report, folder: Path, formats: Sequence[str], *, page: bool) -> list[Path]:
    """Writes all files of a report in place of those of an earlier one, or none of them.

    Raises:
        UnwritableFileError: If the disk refuses, naming the folder, which is then unchanged.
    """
    return replace_files(folder, lambda beside: _write_files(report, beside, formats, page=page), _remove_earlier)


def replace_files(
    folder: Path, write: Callable[[Path], Sequence[Path]], before: Callable[[Path], object] | None = None
) -> list[Path]:
    """Writes files into a temporary folder and then moves all of them into place; if writing fails, none.

    `write` gets the temporary folder; `before` gets the final one before files in it are replaced.

    Raises:
        UnwritableFileError: If the disk refuses, naming the folder, which is then unchanged.
    """
    there = folder.is_dir()
    beside = (folder if there else folder.parent) / f".part-{uuid.uuid4().hex[:8]}.report"
    try:
        beside.mkdir(parents=True)
        names = [path.relative_to(beside) for path in write(beside)]
        if there:
            if before is not None:
                before(folder)
            for name in names:  # the summary first: it marks the folder as a report even if a kill interrupts this
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(beside / name, folder / name)
        else:
            move_folder(beside, folder)
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise UnwritableFileError(f"{folder}: cannot be written ({cause.strerror or cause})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [folder / name for name in names]


def page_name(data: str) -> str:
    """File name of a data set's page, which differs from that of every other and of the first page.

    Other characters than letters, digits and _.+@- become an underscore, and so do dots and hyphens at the beginning.
    """
    return distinct_name(data, r"[^\w.+@-]+|^[.-]+|^(?=(?i:readme)$)") + ".md"


def check_kept(folder: Path, runs: Sequence[RunEntry]) -> None:
    """Refuses to overwrite files that are no pages of studies, and records of runs that would be lost."""
    for name in {*(page_name(str(run.get("data"))) for run in runs), SUMMARY_PAGE}:
        path, mark = folder / name, MADE_BY if name == SUMMARY_PAGE else PAGE_BEGINS
        if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{path}: is not a page made by ekd-report; use another --output")
    given = {_identity(run) for run in runs}
    for path in sorted(folder.glob(f"*{RECORDS}")):
        lost = [run for run in read_records(path) if _identity(run) not in given]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise UserError(
                f"{path}: would lose runs that are not among the given ones ({lost[0].name}{more}); add this file to "
                "the command"
            )


def _row(run: RunEntry) -> tuple[Any, ...]:
    return (run.study, run.row, Protocol.of(run))


def _identity(run: RunEntry) -> tuple[Any, ...]:
    """Identity of a run of a study, equal for its directory and its record in a file of records."""
    return (*_row(run), int(run.get("seed")), run.time, run.get("test_accuracy"))


def each_once(runs: Iterable[RunEntry]) -> list[RunEntry]:
    """Runs of studies, each once if it was given twice: then as the record that holds more.

    Raises:
        UserError: For two runs of one row that differ in more than their seed.
    """
    found: dict[tuple[Any, ...], RunEntry] = {}
    rows: dict[tuple[Any, ...], RunEntry] = {}
    every = list(runs)
    about = {(run.study, Protocol.of(run)): run.about for run in every if run.about}  # only records have it
    for run in every:
        first = rows.setdefault(_row(run), run)
        if differ := setups.differences(first, run):
            name, values = next(iter(differ.items()))
            raise UserError(
                f"{first.name} and {run.name}: both belong to row {run.row} of study {run.study} but differ in {name} "
                f"({', '.join(map(setups.short, values))}); rename the folder of one of the two studies"
            )
        earlier = found.setdefault(_identity(run), run)
        if len(run.result or ()) > len(earlier.result or ()):  # the run itself, perhaps evaluated since
            found[_identity(run)] = run
    kept = found.values()
    return [run.having(about=run.about or about.get((run.study, Protocol.of(run)), "")) for run in kept]


def record_lines(study: str, runs: Sequence[RunEntry]) -> list[str]:
    """Lines of a file of records, see `read_records`: one with the content that all runs share, then one per run."""
    every = [_record(run) for run in runs]
    about = next((run.about for run in runs if run.about), "")
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
    """The record of a run: numbers and words, without curves, predictions, matrices, paths and the host's name."""
    result = {}
    for key, value in (run.result or {}).items():
        if key in ("teachers", "chain"):
            result[key] = [{k: one[k] for k in _TEACHER if k in one} for one in value or []]
        elif key == "test_subsets":  # of single branches alone
            result[key] = [one for one in value or [] if len(one["branches"]) == 1]
        elif value is not None and (key in _KEPT_LISTS or not isinstance(value, list | dict)):
            result[key] = value
    provenance = _machine(run.provenance)
    resumed = {**provenance, "resumed": [_machine(one) for one in run.provenance.get("resumed") or ()]}
    if kind_of_machine(resumed) != kind_of_machine(provenance):
        provenance = resumed
    config = setups.settings(run)
    if options := run.setting("student.options"):
        config |= {f"student.options.{key}": value for key, value in options.items()}
    return {"row": run.row, "time": run.time, "result": result, "config": config, "provenance": provenance}


def _machine(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a record keeps of a start: hardware and the version of PyTorch."""
    hardware, packages = provenance.get("hardware") or {}, provenance.get("packages") or {}
    kept = {key: hardware.get(key) for key in ("cpu", "cpu_capability", "gpus", "threads")}
    return {"hardware": kept, "packages": {"torch": packages.get("torch")}} if hardware else {}


def write_records(runs: Iterable[RunEntry], folder: Path) -> list[Path]:
    """Writes a file of records, `<data>.jsonl`, for each data set, with the runs of all its studies."""
    found: dict[str, dict[tuple[str, str], list[RunEntry]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(
        runs, key=lambda run: (str(run.study), record_name(str(run.study), str(run.row), run.result or {}), run.name)
    ):
        protocol = json.dumps(asdict(Protocol.of(run)), sort_keys=True)
        found[Path(page_name(str(run.get("data")))).stem][str(run.study), protocol].append(run)
    paths = []
    for data, studies in found.items():
        lines = [line for (study, _), own in studies.items() for line in record_lines(study, own)]
        paths.append(folder / f"{data}{RECORDS}")
        write_text(paths[-1], "\n".join(lines) + "\n")
    return paths


def _write_files(report: Report, folder: Path, formats: Sequence[str], *, page: bool) -> list[Path]:
    files = [folder / name for name in (SUMMARY, TABLES, RUNS)]
    write_text(folder / RUNS, runs_csv(report))
    if formats:
        from ekd_lightning.reporting.figures import write_figures  # noqa: PLC0415 (needs matplotlib)

        files += write_figures(report, folder / FIGURES, formats)
    write_text(folder / TABLES, markdown(report, [path.relative_to(folder).as_posix() for path in files]))
    if page:
        from ekd_lightning.reporting.page import page as page_text  # noqa: PLC0415 (needs plotly)

        write_text(folder / PAGE, page_text(report))
        files.append(folder / PAGE)
    names = [path.relative_to(folder).as_posix() for path in files]
    write_text(folder / SUMMARY, json.dumps({**summary(report), "files": names}, indent=1, allow_nan=False) + "\n")
    return files


def _remove_earlier(folder: Path) -> None:
    """Removes the files of an earlier report, which its summary lists, so that no old figure stays beside new ones."""
    try:
        listed: Any = read_json(folder / SUMMARY).get("files", [])
    except (OSError, DamagedFileError):
        return
    root = folder.resolve()
    for name in listed if isinstance(listed, list) else []:
        with contextlib.suppress(OSError, ValueError):  # not a possible file name
            path = (folder / str(name)).resolve()
            if path.is_file() and root in path.parents and path.suffix in _SUFFIXES:
                path.unlink()


def markdown(report: Report, files: Sequence[str] = ()) -> str:
    """The whole report as a Markdown page, with each block's figure of accuracy and cost if it is among `files`."""
    wanted = {block.key: file_name(COST_FIGURE, block.key) for block in report.blocks}
    shown = {key: next((f for f in files if Path(f).stem == name), None) for key, name in wanted.items()}
    left = [
        (run.name, md.code(group.label), run.get("seed"), run.state, run.error or "")
        for run, group in sorted(report.not_counted, key=lambda pair: pair[0].name)
    ]
    values = {
        "report": report,
        "figures": {key: md.image(path, "Test accuracy against cost") for key, path in shown.items() if path},
        "tables": {key: md.Markdown(tables.markdown(rows)) for key, rows in report.rows.items()},
        "full_names": {
            key: [md.Markdown(f"{md.code(label)}: {md.prose(setting)}") for label, setting in found.items()]
            for key, rows in report.rows.items()
            if (found := tables.full_names(rows))
        },
        "legend": md.Markdown(tables.REPORT_LEGEND),
        "not_counted": md.table(("run", "setting", "seed", "state", "error"), left) if left else "",
    }
    return md.fill("ekd_lightning.reporting", "report.md", values)


def runs_csv(report: Report) -> str:
    """One row per run, every field of the results a column.

    Lists become one column per element (`test_branch_accuracy_0`); operating points are named after their branches or
    threshold (`test_subsets_0+2_accuracy`, `test_early_exit_0.9_accuracy`). Settings that are in no result keep their
    dotted names, e.g. `recipe.lr`. Runs that are not done have empty fields.
    """
    counted = {run.name: group for group in report.groups for run in (*group.runs, *group.duplicates)}
    fields = ("method", "data", "student", "num_branches", "num_teachers", "fraction", "seed")
    records = []
    for run in report.collection.runs:
        group = counted[run.name]
        found: dict[str, Any] = {"run": run.name, "state": run.state, "error": run.error}
        found |= {"counts": run in group.done, "setting": group.label, **{key: run.get(key) for key in fields}}
        for key, value in (run.result or {}).items():
            flatten(value, key, found)
        found |= {key: value for key, value in setups.settings(run).items() if not isinstance(value, list)}
        records.append(found)
    return tables.csv_text(records)


def flatten(value: Any, name: str, into: dict[str, Any]) -> None:
    """Adds a field of a result to a flat record, with several columns for nested lists and mappings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            flatten(item, f"{name}_{key}", into)
    elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        into[name] = " ".join(value)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            flatten(*_named(item, name, position), into)
    else:
        into[name] = value


def _named(item: Any, name: str, position: int) -> tuple[Any, str]:
    """An element and the name of its columns."""
    for key in ("branches", "threshold"):
        if isinstance(item, Mapping) and key in item:
            what = item[key]
            word = "+".join(map(str, what)) if isinstance(what, list) else f"{what}"
            return {k: v for k, v in item.items() if k != key}, f"{name}_{word}"
    return item, f"{name}_{position}"
