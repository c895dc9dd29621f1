"""`ekd-report`: the results of many runs as tables, figures and one HTML page that begins with the answer."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekd_lightning.config.commands import print_next, typed
from ekd_lightning.config.edge import make_parser, parse_names, run_command
from ekd_lightning.config.overrides import shell_word
from ekd_lightning.errors import UserError, few, require
from ekd_lightning.progress import part, phase, session

if TYPE_CHECKING:
    from ekd_lightning.reporting.report import Report
    from ekd_lightning.runs.collection import Collection, RunEntry
    from ekd_lightning.studies.study import Study

log = logging.getLogger(__name__)

PROGRAM = "ekd-report"
FORMATS = ("svg", "png")
_WITHOUT_FIGURES = "leave it out with --no-figures"
_SHOWN = 12  # notes in the terminal; the page has all of them
EXAMPLES = """\
examples:
  ekd-report multirun/2026-01-31/12-00-00 -o report         one sweep
  ekd-report compare/c10 compare/c100 -o report             several studies; data sets and protocols stay apart
  ekd-report outputs -o report --reference kd_mean          differences from kd_mean instead of the plain student
  ekd-report compare/c10 -o report --force                  replaces an earlier report
  ekd-report compare/c10 -o report --no-page --no-figures   only the tables, without matplotlib and plotly
  ekd-report runs/study/full -o pages --study-pages         a page for each data set, and small records of all runs
  ekd-report pages/*.jsonl -o pages --study-pages --force   the same pages from the records alone

It writes index.html, figures/, tables.md, runs.csv (one row per run) and summary.json. Runs are found at any depth
below the given folders. docs/reporting.md says how they are grouped and compared.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-report`; exit code 2 for a user's mistake."""
    parser = make_parser(PROGRAM, "Report on any number of runs: does EKD help, how much, at what cost?", EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run directories, sweeps, studies")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument("--reference", metavar="LABEL", help="setting to compare with (default: ce, else ekd)")
    parser.add_argument("--title", help="title of the page")
    parser.add_argument("--force", action="store_true", help="replace an earlier report")
    parser.add_argument("--formats", default=",".join(FORMATS), help="formats of the figures (default: %(default)s)")
    parser.add_argument("--no-figures", action="store_true", help="write no files of figures")
    parser.add_argument("--no-page", action="store_true", help="write no HTML page")
    parser.add_argument(
        "--study-pages", action="store_true",
        help="write README.md, one page per data set, and small records of the runs to remake the pages from",
    )  # fmt: skip
    parser.add_argument("--study", metavar="NAME", help="with --study-pages: list the missing runs of this study")
    run_command(parser, run_report, argv, level=logging.WARNING)


def run_report(args: argparse.Namespace) -> None:
    """Reads the runs and writes the report.

    Raises:
        UserError: For a user's mistake, before anything is written.
    """
    if args.study_pages:
        with session("report", keep=False), phase("report"):
            return write_study_pages(args)
    if args.study:
        raise UserError("--study: has an effect only with --study-pages")
    if args.no_figures and args.formats != ",".join(FORMATS):
        raise UserError("--formats: has no effect with --no-figures")
    formats = [] if args.no_figures else parse_names("--formats", args.formats, FORMATS)
    with session("runs", "report", keep=False):
        with phase("runs"):
            with part("importing the report's modules"):
                from ekd_lightning.reporting import report_files  # noqa: PLC0415 (slow; --help needs none)
                from ekd_lightning.reporting.report import DEFAULT_TITLE, make_report  # noqa: PLC0415
                from ekd_lightning.runs.collection import collect  # noqa: PLC0415

            if formats:
                require("report", "matplotlib", or_else=_WITHOUT_FIGURES)
            if not args.no_page:
                require("report", "plotly", or_else="leave it out with --no-page")
            report_files.check_output(args.output, force=args.force)
            report = make_report(_deciding(collect(args.runs)), args.title or DEFAULT_TITLE, args.reference)
        with phase("report"):
            files = report_files.write_report(report, args.output, formats, page=not args.no_page)
    _print(report, args.output, files)
    if following := _following(report, args.runs):
        print_next(*following)


def _following(report: Report, places: Sequence[Path]) -> list[str]:
    """The commands that evaluate the runs in full and export a student of the setting that represents EKD."""
    runs = [run for run in report.collection.runs if run.row is None]
    folders = [place for place in places if place.is_dir() and _can_be_evaluated(place, runs)]
    below = [run for run in runs if any(run.directory.is_relative_to(place.absolute()) for place in folders)]
    found = [" ".join(["ekd-evaluate", *map(typed, folders), "--parts all", *_imports(below)])] if folders else []
    subjects = [run for answer in report.answers if answer.subject for run in answer.subject.done if run in runs]
    return found + [" ".join(["ekd-export", typed(run.directory), *_imports([run])]) for run in subjects[:1]]


def _imports(runs: Iterable[RunEntry]) -> list[str]:
    """The override that consents by name to the modules of runs' records; empty without any."""
    lists = (found for run in runs if isinstance(found := run.setting("imports"), list))
    found = (name for names in lists for name in names)
    names = sorted({name for name in found if isinstance(name, str) and all(map(str.isidentifier, name.split(".")))})
    return [shell_word(f"imports=[{','.join(names)}]")] if names else []


def _can_be_evaluated(place: Path, runs: Sequence[RunEntry]) -> bool:
    """Whether all runs of a folder are finished, and some lack a part of the evaluation."""
    own = [run for run in runs if run.directory.is_relative_to(place.absolute())]
    results = [run.result for run in own if run.result is not None]
    return all(run.state == "done" for run in own) and any(result.lacks_evaluation for result in results)


def write_study_pages(args: argparse.Namespace) -> None:
    """Writes the records of all runs by data set, and pages that are made from these records alone.

    Raises:
        UserError: For a user's mistake, before anything is written.
    """
    from ekd_lightning.reporting import report_files, study_pages  # noqa: PLC0415 (slow; --help needs none)
    from ekd_lightning.reporting.report import make_report  # noqa: PLC0415
    from ekd_lightning.runs.collection import RECORDS, Collection, collect, read_records  # noqa: PLC0415

    require("report", "matplotlib", or_else=_WITHOUT_FIGURES)
    report_files.check_output(args.output, force=args.force, marked=False)
    found = collect(args.runs).runs
    every = list(_of_studies(found, _study))
    if lone := {run.name for run in found if run.is_over} - {run.name for run in every}:
        log.warning("left out, because their study.json is missing or does not list them: %s", few(sorted(lone)))
    runs = report_files.each_once(run for run in every if run.state == "done")
    if not runs:
        raise UserError(f"{' '.join(map(str, args.runs))}: holds no finished run of a study")
    missing = [] if args.study is None else _missing(args.study, every)
    report_files.check_kept(args.output, runs)
    made: list[Report] = []

    def write(folder: Path) -> list[Path]:
        records = report_files.write_records(runs, folder)
        made.append(make_report(Collection(folder, tuple(run for path in records for run in read_records(path)))))
        return [*records, *study_pages.write_pages(made[0], folder, missing)]

    files = report_files.replace_files(args.output, write)
    (report,) = made
    print(study_pages.lead([one for block in report.blocks for one in study_pages.standings(block)]))
    print(f"{len(runs)} runs; {len(files)} files in {args.output}")
    over = all(run.state == "done" for run in every)  # records hold finished runs only
    sources = [path for path in files if path.suffix == RECORDS] if over else args.runs
    again = ["ekd-report", *map(typed, sources), "-o", typed(args.output)]
    given = ["--study", typed(args.study)] if args.study else []
    print_next(" ".join([*again, "--study-pages", *given, "--force"]))


def _of_studies(runs: Iterable[RunEntry], read: Callable[[Path], Study | None]) -> Iterator[RunEntry]:
    """The runs that belong to a study, with its name (of the declaration, else of the folder) and their row."""
    known: dict[Path, Study | None] = {}
    for run in runs:
        if run.row is not None:
            yield run
            continue
        folder, row = run.directory.parent.parent, run.directory.name.rsplit("-f", 1)[0]
        if folder not in known:
            known[folder] = read(folder)
        if (study := known[folder]) is not None and row in {one.name for one in study.rows}:
            yield replace(run, row=row, study=study.declaration or folder.name, decides=row in study.deciding)


def _study(folder: Path) -> Study | None:
    from ekd_lightning.studies.study import STUDY_FILE, read_study  # noqa: PLC0415

    return read_study(folder) if (folder / STUDY_FILE).is_file() else None


def _deciding(collection: Collection) -> Collection:
    """The runs, each marked as deciding or not by its study.json; runs of a damaged study all decide."""

    def undamaged(folder: Path) -> Study | None:
        with suppress(UserError):
            return _study(folder)
        return None

    found = _of_studies((run for run in collection.runs if run.row is None), undamaged)
    others = {run.directory for run in found if not run.decides}
    runs = (replace(run, decides=False) if run.directory in others else run for run in collection.runs)
    return replace(collection, runs=tuple(runs))


def _missing(name: str, runs: Sequence[RunEntry]) -> list[str]:
    """The runs of a declared study that are not done: one line for each part that lacks some."""
    from ekd_lightning.reporting.tables import STATE_NAMES  # noqa: PLC0415
    from ekd_lightning.runs.directory import RunState  # noqa: PLC0415
    from ekd_lightning.studies.declaration import read_declaration  # noqa: PLC0415

    declared, study = read_declaration(name), Path(name).stem
    found: dict[tuple[Any, ...], RunState] = {}
    for run in sorted(runs, key=lambda run: run.state == RunState.DONE):
        found[run.study, run.get("data"), run.get("fraction"), run.row, run.get("seed")] = run.state
    lines = []
    for one in declared.parts:
        keys = [(study, one.data, one.fraction, row.name, seed) for row in declared.rows for seed in row.seeds]
        states = Counter(found.get(key, RunState.PLANNED) for key in keys)
        names = {**STATE_NAMES, RunState.PLANNED: "not run"}
        if left := [
            f"{states[state]} {names[state]}" for state in RunState if states[state] and state != RunState.DONE
        ]:
            share = f"{100 * one.fraction:g} % of the labels"
            lines.append(f"{one.data}, {share}: {', '.join(left)}, of {len(keys)} runs of `{study}`")
    return lines


def _print(report: Report, folder: Path, files: Sequence[Path]) -> None:
    from ekd_lightning.reporting.report_files import PAGE, TABLES  # noqa: PLC0415
    from ekd_lightning.runs.collection import STATES  # noqa: PLC0415

    for note in report.notes[:_SHOWN]:
        print(f"{PROGRAM}: {note}", file=sys.stderr)
    if len(report.notes) > _SHOWN:
        print(f"{PROGRAM}: {len(report.notes) - _SHOWN} more notes are in {folder / TABLES}", file=sys.stderr)
    print(report.lead)
    if len(report.answers) > 1:
        for one in report.answers:
            print(f"- {one.headline}")
    states = ", ".join(f"{count} {state}" for state in STATES if (count := report.collection.count(state)))
    page = folder / PAGE
    print(f"{states}; {len(files)} files in {folder}" + (f", open {page}" if page in files else ""))


if __name__ == "__main__":
    main()
