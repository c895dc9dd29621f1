"""Files of a report: tables in Markdown, one tidy CSV of all runs, a summary in JSON, figures and the page."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ekd_lightning import markdown as md
from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError, UnwritableFileError, move_folder, read_json, write_text
from ekd_lightning.reporting import setups, tables
from ekd_lightning.reporting.figure_style import COST_FIGURE, file_name
from ekd_lightning.reporting.groups import Group
from ekd_lightning.reporting.report import Report, summary
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.lock import check_directory

PAGE, FIGURES, RUNS, TABLES, SUMMARY = "index.html", "figures", "runs.csv", "tables.md", "summary.json"
_SUFFIXES = (".svg", ".png", ".html", ".md", ".csv", ".json")


def check_packages(*, figures: bool, page: bool) -> None:
    """Refuses figures or a page without their package.

    Raises:
        UserError: Naming the extra to install, and the option that does without.
    """
    for needed, package, option in ((figures, "matplotlib", "--no-figures"), (page, "plotly", "--no-page")):
        if needed and find_spec(package) is None:
            raise UserError(
                f"{package} is not installed: pip install 'ekd-lightning[report]', or leave it out with {option}"
            )


def check_output(folder: Path, *, force: bool) -> None:
    """Refuses a folder that is not empty.

    Raises:
        UserError: If it is a file, or not empty without `force`, or not empty and no report.
    """
    if not folder.exists():
        return check_directory(folder)
    if not folder.is_dir():
        raise UserError(f"--output {folder}: is a file")
    if not any(folder.iterdir()):
        return
    if not force:
        raise UserError(f"--output {folder}: is not empty; --force writes over an earlier report")
    if not (folder / SUMMARY).is_file():
        raise UserError(f"--output {folder}: is not empty and no report (it has no {SUMMARY})")


def write_report(report: Report, folder: Path, formats: Sequence[str], *, page: bool) -> list[Path]:
    """Writes all files of a report in place of those of an earlier one, or none of them.

    Args:
        report: The report.
        folder: Created if necessary.
        formats: Of the figures; none if empty.
        page: Whether to write the HTML page.

    Returns:
        The files, in the order of writing.

    Raises:
        UnwritableFileError: If the disk refuses, naming the folder, which is then unchanged.
    """
    there = folder.is_dir()
    beside = (folder if there else folder.parent) / f".part-{uuid.uuid4().hex[:8]}.report"
    try:
        beside.mkdir(parents=True)
        names = [path.relative_to(beside) for path in _write_files(report, beside, formats, page=page)]
        if there:
            _remove_earlier(folder)
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
    write_text(folder / SUMMARY, summary_json({**summary(report), "files": names}))
    return files


def _remove_earlier(folder: Path) -> None:
    """Removes what an earlier report wrote, as its summary lists it: no figure of it is left to pass for a new one."""
    try:
        listed: Any = read_json(folder / SUMMARY).get("files", [])
    except (OSError, DamagedFileError):
        return
    root = folder.resolve()
    for name in listed if isinstance(listed, list) else []:
        with contextlib.suppress(OSError, ValueError):  # no name of a file
            path = (folder / str(name)).resolve()
            if path.is_file() and root in path.parents and path.suffix in _SUFFIXES:
                path.unlink()


def markdown(report: Report, files: Sequence[str] = ()) -> str:
    """The whole report as a Markdown page.

    Args:
        report: The report.
        files: Paths of the report's files, relative to the page, which shows each block's figure of accuracy and cost.
    """
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
    records = [_run(run, counted[run.name]) for run in report.collection.runs]
    return tables.csv_text(records)


def _run(run: RunEntry, group: Group) -> dict[str, Any]:
    found: dict[str, Any] = {
        "run": run.name,
        "state": run.state,
        "error": run.error,
        "counts": run in group.done,
        "setting": group.label,
    }
    for key in ("method", "data", "student", "num_branches", "num_teachers", "fraction", "seed"):
        found[key] = run.get(key)
    for key, value in (run.result or {}).items():
        flatten(value, key, found)
    return found | {key: value for key, value in setups.settings(run).items() if not isinstance(value, list)}


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


def summary_json(content: Mapping[str, Any]) -> str:
    """Text of summary.json."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
