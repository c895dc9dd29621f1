"""`ekd-compare`: methods × fractions × seeds as one resumable study, and one table of it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from rich.console import Console

from ekd_lightning.config.build import import_user_modules
from ekd_lightning.config.config import register_schema
from ekd_lightning.config.edge import one_line
from ekd_lightning.errors import UserError
from ekd_lightning.files import write_text
from ekd_lightning.studies import plan as studies
from ekd_lightning.studies.plan import Study
from ekd_lightning.studies.study_rows import parse_matches, plan_rows
from ekd_lightning.studies.study_tuned import with_tuned

if TYPE_CHECKING:
    from ekd_lightning.reporting.comparison import Block

PROGRAM = "ekd-compare"
_WIDTH = 200  # where there is no terminal
EXAMPLES = """\
examples:
  ekd-compare --methods ce,kd_mean,ekd --fractions 0.1 --seeds 0,1,2 --output compare/c10 experiment=cifar10_limited
  ekd-compare --methods ekd,kd_mean@resnet14 --output compare/digits recipe.epochs=5
  ekd-compare --output compare/c10                   continue it: done runs are skipped, stopped ones resumed
  ekd-compare --output compare/c10 --seeds 3,4       two more seeds
  ekd-compare --output compare/c10 --report-only     the table alone
  ... hydra/launcher=parallel hydra.launcher.n_jobs=2      two runs at a time, one thread each

Overrides are those of ekd-train; they hold for all rows. docs/comparing.md tells more.
"""
log = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Run methods × fractions × seeds as one resumable study, and compare them in one table.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for ekd-train")
    parser.add_argument(
        "--methods", help="rows: a method, or method@network for a plain student, e.g. ce,ekd"
    )
    parser.add_argument("--fractions", help="shares of the training images (default: that of the settings)")
    parser.add_argument("--seeds", help="default: 0,1,2")
    parser.add_argument("--output", type=Path, required=True, help="folder of the study")
    parser.add_argument(
        "--match",
        help="plain students of the branched student's cost: macs,parameters (default), one of them, or none",
    )
    parser.add_argument("--no-controls", action="store_true", help="only the rows that were asked for")
    parser.add_argument("--tuned", type=Path, help="folder of <row>.yaml files with overrides, from ekd-tune")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--print-jobs", action="store_true", help="print the commands of what would be run")
    parser.add_argument("--retry-failed", action="store_true", help="run failed runs again")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-compare`; exit code 1 if a run failed or is missing, 2 for a user's mistake.

    Args:
        argv: Arguments without the command's name; those of the process if None.
    """
    args = make_parser().parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on, instead of printing its own report
    register_schema()
    with one_line(PROGRAM):
        complete = run_compare(args)
    if not complete:
        sys.exit(1)


def run_compare(args: argparse.Namespace) -> bool:
    """Runs what is missing, then reports.

    Returns:
        Whether all runs are done.

    Raises:
        UserError: For a user's mistake, before anything runs; or for runs that cannot be compared.
    """
    folder = args.output.absolute()
    old = studies.read_study(folder)
    if args.report_only:
        if old is None:
            raise UserError(f"--output {args.output}: not a study, there is nothing to report")
        other = (
            "methods",
            "fractions",
            "seeds",
            "match",
            "no_controls",
            "tuned",
            "print_jobs",
            "retry_failed",
        )
        _refuse(args, (*other, "overrides"), "has no effect on --report-only, which shows all that is there")
        return report(old, folder)
    common, hydra_words = studies.split_overrides(args.overrides)
    with initialize_config_module("ekd_lightning.conf", version_base="1.3", job_name="train"):
        search = [word for word in hydra_words if studies.key_of(word) == "hydra.searchpath"]
        composer = partial(_compose, search)
        study = ask(args, common, old, composer)
        with _alone(folder):
            if args.print_jobs:
                _print_jobs(study, folder, composer, args.retry_failed)
                return True
            _run(study, folder, composer, hydra_words, args.retry_failed)
    return report(study, folder)


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuses options that would be ignored."""
    for name in names:
        value = getattr(args, name)
        if value:
            word = value[0] if name == "overrides" else f"--{name.replace('_', '-')}"
            raise UserError(f"{word}: {why}")


def _compose(search: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    return compose("train", overrides=[*search, *overrides])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / studies.LOCK_FILE, timeout=0):
            yield
    except Timeout:
        raise UserError(f"--output {folder}: another ekd-compare is at work there") from None


def ask(
    args: argparse.Namespace,
    common: tuple[str, ...],
    old: Study | None,
    composer: Callable[..., DictConfig],
) -> Study:
    """The study that is asked for, together with what the folder holds already.

    Raises:
        UserError: For unknown names, bad numbers, or what contradicts the folder's study.
    """
    if args.methods is None:
        if old is None:
            raise UserError("--methods: which rows? e.g. --methods ce,kd_mean,ekd")
        _refuse(args, ("match", "no_controls", "tuned"), "is about rows: say which with --methods")
    common = common if old is None else studies.continued(old, common)
    cfg = composer(overrides=common)
    import_user_modules(list(cfg.imports))
    default_fraction = cfg.data.fraction if cfg.data.fraction is not None else 1.0
    fractions = studies.parse_fractions(args.fractions) if args.fractions else (default_fraction,)
    seeds = studies.parse_seeds(args.seeds) if args.seeds else (0, 1, 2)
    rows = []
    if args.methods is not None:
        matches = parse_matches(args.match or ("none" if args.no_controls else "macs,parameters"))
        rows = plan_rows(args.methods, matches, not args.no_controls, common, old, composer)
    if args.tuned:
        rows = with_tuned(rows, args.tuned, cfg.data.name, fractions)
    if old is None:
        return Study(tuple(rows), fractions, seeds, common, cfg.data.name)
    asked = Study(
        tuple(rows),
        fractions if args.fractions else old.fractions,
        seeds if args.seeds else old.seeds,
        common,
        old.data,
    )
    return studies.union(old, asked)


def _print_jobs(study: Study, folder: Path, composer: Callable[..., DictConfig], retry: bool) -> None:
    from ekd_lightning.studies.study_runs import commands, plan  # noqa: PLC0415

    jobs = plan(study, folder, composer, retry_failed=retry)[0]
    studies.write_study(study, folder)  # for --report-only, once the jobs have run
    for line in commands(jobs):
        print(line)


def _run(
    study: Study, folder: Path, composer: Callable[..., DictConfig], hydra_words: Sequence[str], retry: bool
) -> None:
    from ekd_lightning.studies.launching import launch  # noqa: PLC0415
    from ekd_lightning.studies.study_runs import RUNS, plan  # noqa: PLC0415
    from ekd_lightning.studies.sweep import as_typed  # noqa: PLC0415

    jobs, left = plan(study, folder, composer, retry_failed=retry)
    studies.write_study(study, folder)
    total = len(study.rows) * len(study.fractions) * len(study.seeds)
    resumed = sum(job.resumed for job in jobs)
    log.info("%d runs in the study, %d to be run (%d of them resumed)", total, len(jobs), resumed)
    for run in left:
        log.warning("%s failed before: %s (--retry-failed runs it again)", run.name, run.error)
    if jobs:
        launch(jobs, folder / RUNS, hydra_words, command=f"{PROGRAM} --output {as_typed(folder)}")


def report(study: Study, folder: Path) -> bool:
    """Writes comparison.csv, .md and .json, and prints the table.

    Returns:
        Whether all runs are done.

    Raises:
        UserError: If runs went different ways.
    """
    from ekd_lightning.reporting.comparison import compare  # noqa: PLC0415
    from ekd_lightning.studies.study_runs import read_runs  # noqa: PLC0415

    runs = read_runs(study, folder)
    blocks = compare(runs, study.data)
    _write(blocks, folder, {row.name: row.settings for row in study.rows})
    _print(blocks, folder)
    states = Counter(run.state for run in runs)
    print(f"{folder}: " + ", ".join(f"{count} {state}" for state, count in states.most_common()))
    return set(states) == {"done"}


def _write(blocks: Sequence[Block], folder: Path, settings: Mapping[str, str]) -> None:
    from ekd_lightning.reporting.comparison_table import csv_text, json_text, markdown  # noqa: PLC0415

    made: dict[str, Any] = {"csv": csv_text, "md": markdown, "json": json_text}
    for ending, make in made.items():
        write_text(folder / f"comparison.{ending}", make(blocks, settings))


def _print(blocks: Sequence[Block], folder: Path) -> None:
    from ekd_lightning.reporting.comparison_table import LEGEND, rich_table  # noqa: PLC0415

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=_WIDTH)
    for block in blocks:
        console.print(rich_table(block))
    console.print(LEGEND, highlight=False)


if __name__ == "__main__":
    main()
