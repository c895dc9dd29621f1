"""`ekd-report`: the results of many runs as tables, figures and one HTML page that begins with the answer."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ekd_lightning.config.edge import make_parser, parse_names, run_command
from ekd_lightning.errors import UserError
from ekd_lightning.files import write_text
from ekd_lightning.progress import part, phase, session

if TYPE_CHECKING:
    from ekd_lightning.reporting.report import Report
    from ekd_lightning.runs.collection import RunEntry

PROGRAM = "ekd-report"
FORMATS = ("svg", "png")
_SHOWN = 12  # notes in the terminal; the page has all of them
EXAMPLES = """\
examples:
  ekd-report multirun/2026-01-31/12-00-00 -o report         one sweep
  ekd-report compare/c10 compare/c100 -o report             several studies; data sets and protocols stay apart
  ekd-report outputs -o report --reference kd_mean          differences to kd_mean instead of the plain student
  ekd-report compare/c10 -o report --force                  replaces an earlier report
  ekd-report compare/c10 -o report --no-page --no-figures   only the tables, without matplotlib and plotly
  ekd-report runs/study/full -o pages --study-pages         a page for each data set, and small records of all runs
  ekd-report pages/*.jsonl -o pages --study-pages           the same pages from the records alone

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
    parser.add_argument("--force", action="store_true", help="write over an earlier report")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of the figures (default: %(default)s)")
    parser.add_argument("--no-figures", action="store_true", help="no figures as files")
    parser.add_argument("--no-page", action="store_true", help="no HTML page")
    parser.add_argument(
        "--study-pages", action="store_true",
        help="instead: README.md, a page for each data set, and small records of the runs, which make the pages again",
    )  # fmt: skip
    parser.add_argument(
        "--study", metavar="NAME", help="with --study-pages: the declared study, to name what is not run"
    )
    parser.add_argument("--readme", type=Path, help="with --study-pages: its section between the marks is made anew")
    run_command(parser, run_report, argv, level=logging.WARNING)


def run_report(args: argparse.Namespace) -> None:
    """Reads the runs and writes the report.

    Raises:
        UserError: For a user's mistake, before anything is written.
    """
    if args.study_pages:
        with session("report", keep=False), phase("report"):
            return write_study_pages(args)
    for name in ("study", "readme"):
        if getattr(args, name):
            raise UserError(f"--{name}: has an effect with --study-pages alone")
    if args.no_figures and args.formats != ",".join(FORMATS):
        raise UserError("--formats: has no effect with --no-figures")
    formats = [] if args.no_figures else parse_names("--formats", args.formats, FORMATS)
    with session("runs", "report", keep=False):
        with phase("runs"):
            with part("importing what compares them"):
                from ekd_lightning.reporting import report_files  # noqa: PLC0415 (slow; --help needs none)
                from ekd_lightning.reporting.report import DEFAULT_TITLE, make_report  # noqa: PLC0415
                from ekd_lightning.runs.collection import collect  # noqa: PLC0415

            report_files.check_packages(figures=bool(formats), page=not args.no_page)
            report_files.check_output(args.output, force=args.force)
            report = make_report(collect(args.runs), args.title or DEFAULT_TITLE, args.reference)
        with phase("report"):
            files = report_files.write_report(report, args.output, formats, page=not args.no_page)
    _print(report, args.output, files)


def write_study_pages(args: argparse.Namespace) -> None:
    """Reads runs and records, writes the records of all by data set, and the pages from these records alone.

    Raises:
        UserError: For a user's mistake, before anything is written.
    """
    from ekd_lightning.reporting import report_files, study_pages  # noqa: PLC0415 (slow; --help needs none)
    from ekd_lightning.reporting.report import make_report  # noqa: PLC0415
    from ekd_lightning.runs.collection import RECORDS, Collection, collect, read_records  # noqa: PLC0415

    report_files.check_packages(figures=True, page=False)
    about = study_pages.read_about([path for path in args.runs if path.suffix == RECORDS])
    runs = [
        named for run in collect(args.runs).runs if run.result is not None and (named := _of_study(run)) is not None
    ]
    if not runs:
        raise UserError(f"{' '.join(map(str, args.runs))}: no run of a study is done")
    missing = [] if args.study is None else _missing(args.study, runs)
    args.output.mkdir(parents=True, exist_ok=True)
    records = study_pages.write_records(runs, args.output, about)
    report = make_report(Collection(args.output, tuple(run for path in records for run in read_records(path))))
    files = [*records, *study_pages.write_pages(report, args.output, about, missing)]
    if args.readme is not None:
        _write_section(args.readme, study_pages.readme_section(report, args.output.as_posix()))
    print(study_pages.lead([one for block in report.blocks for one in study_pages.standings(block)]))
    print(f"{len(runs)} runs; {len(files)} files in {args.output}")


def _of_study(run: RunEntry) -> RunEntry | None:
    """A run with the row and the study that it belongs to; None for one of no study."""
    from ekd_lightning.studies.study import STUDY_FILE, read_study  # noqa: PLC0415

    if run.row is not None:
        return run
    folder = run.directory.parent.parent
    study = read_study(folder) if (folder / STUDY_FILE).is_file() else None
    row = run.directory.name.rsplit("-f", 1)[0]
    if study is None or run.state != "done" or row not in {one.name for one in study.rows}:
        return None
    return replace(run, row=row, study=folder.parent.name, decides=row in study.deciding)


def _missing(name: str, runs: Sequence[RunEntry]) -> list[str]:
    """What of a declared study no run has, a line for each part."""
    from ekd_lightning.studies.declaration import read_declaration  # noqa: PLC0415

    declared = read_declaration(name)
    done = {(run.study, run.get("data"), run.get("fraction"), run.row, run.get("seed")) for run in runs}
    lines = []
    for one in declared.parts:
        asked = [(name, one.data, one.fraction, row.name, seed) for row in declared.rows for seed in row.seeds]
        if left := len(set(asked) - done):
            share = f"{100 * one.fraction:g} % of the labels"
            lines.append(f"{one.data}, {share}: {left} of {len(asked)} runs of `{name}`")
    return lines


def _write_section(readme: Path, section: str) -> None:
    start, end = "<!-- first-result -->\n", "<!-- /first-result -->"
    before, _, rest = readme.read_text(encoding="utf-8").partition(start)
    if end not in rest:
        raise UserError(f"{readme}: has no {start.strip()} with {end} after it")
    write_text(readme, f"{before}{start}{section}{end}{rest.split(end, 1)[1]}")


def _print(report: Report, folder: Path, files: Sequence[Path]) -> None:
    from ekd_lightning.reporting.report_files import PAGE, TABLES  # noqa: PLC0415
    from ekd_lightning.runs.collection import STATES  # noqa: PLC0415

    for note in report.notes[:_SHOWN]:
        print(f"{PROGRAM}: {note}", file=sys.stderr)
    if len(report.notes) > _SHOWN:
        print(f"{PROGRAM}: and {len(report.notes) - _SHOWN} more notes, see {folder / TABLES}", file=sys.stderr)
    print(report.lead)
    if len(report.answers) > 1:
        for one in report.answers:
            print(f"- {one.headline}")
    states = ", ".join(f"{count} {state}" for state in STATES if (count := report.collection.count(state)))
    page = folder / PAGE
    print(f"{states}; {len(files)} files in {folder}" + (f", open {page}" if page in files else ""))


if __name__ == "__main__":
    main()
