"""`ekd-report`: the results of many runs as tables, figures and one HTML page that begins with the answer."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ekd_lightning.config.edge import make_parser, parse_names, run_command
from ekd_lightning.errors import UserError
from ekd_lightning.progress import part, phase, session

if TYPE_CHECKING:
    from ekd_lightning.reporting.report import Report

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

It writes index.html, figures/, tables.md, runs.csv (one row per run) and summary.json. Runs are found at any depth
below the given folders. docs/reporting.md says how they are grouped and compared.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-report`; exit code 2 for a user's mistake."""
    parser = make_parser(PROGRAM, "Report on any number of runs: does EKD help, how much, at what cost?", EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run directories, sweeps, studies")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument(
        "--reference", metavar="LABEL", help="setting that others are compared with (default: ce, else ekd)"
    )
    parser.add_argument("--title", help="title of the page")
    parser.add_argument("--force", action="store_true", help="write over an earlier report")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of the figures (default: %(default)s)")
    parser.add_argument("--no-figures", action="store_true", help="no figures as files")
    parser.add_argument("--no-page", action="store_true", help="no HTML page")
    run_command(parser, run_report, argv, level=logging.WARNING)


def run_report(args: argparse.Namespace) -> None:
    """Reads the runs and writes the report.

    Raises:
        UserError: For a user's mistake, before anything is written.
    """
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
