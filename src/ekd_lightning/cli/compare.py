"""`ekd-compare`: methods × fractions × seeds as one resumable study, and one table of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from ekd_lightning.config.commands import print_next, report_command, typed
from ekd_lightning.config.config import register_schema
from ekd_lightning.config.edge import make_parser, run_command, users_files_first
from ekd_lightning.config.overrides import anchored, anchored_search, check_typed, key_of, shell_word
from ekd_lightning.errors import UserError
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.words import names_code
from ekd_lightning.studies.study import parse_numbers, read_study, split_overrides, write_study

PROGRAM = "ekd-compare"
EXAMPLES = """\
examples:
  ekd-compare --methods ce,kd_mean,ekd --fractions 0.1 --seeds 0,1,2 --output compare/c10 experiment=cifar10_limited
  ekd-compare --methods ekd,kd_mean@resnet14 --output compare/digits recipe.epochs=5
  ekd-compare --output compare/c10                   continue it: done runs are skipped, stopped ones resumed
  ekd-compare --output compare/c10 --seeds 3,4       two more seeds
  ekd-compare --output compare/c10 --report-only     the table alone
  ... hydra/launcher=parallel hydra.launcher.n_jobs=2      two runs at a time, one thread each

Overrides are those of ekd-train and apply to all rows. See docs/comparing.md.
"""
_ONLY_WITH_RUNS = (
    *("methods", "fractions", "seeds", "match", "no_controls", "tuned"),
    *("print_jobs", "retry_failed", "overrides"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-compare`; exit code 1 if a run failed or is missing, 2 for a user's mistake."""
    what = "Run methods × fractions × seeds as one resumable study, and compare them in one table."
    parser = make_parser(PROGRAM, what, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for ekd-train")
    parser.add_argument("--methods", help="rows: a method, or method@network for a plain student, e.g. ce,ekd")
    parser.add_argument("--fractions", help="shares of the training images (default: that of the settings)")
    parser.add_argument("--seeds", help="default: 0,1,2")
    parser.add_argument("--output", type=Path, required=True, help="folder of the study")
    parser.add_argument(
        "--match", help="plain students of the branched student's cost: macs,parameters (default), one of them, or none"
    )
    parser.add_argument("--no-controls", action="store_true", help="only the rows that were asked for")
    parser.add_argument("--tuned", type=Path, help="folder of <row>.yaml files with overrides, from ekd-tune")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--print-jobs", action="store_true", help="print the commands of what would be run")
    parser.add_argument("--retry-failed", action="store_true", help="run failed runs again")
    run_command(parser, run_compare, argv)


def run_compare(args: argparse.Namespace) -> bool:
    """Runs what is missing, then reports.

    Returns:
        Whether all runs are done.

    Raises:
        UserError: For a user's mistake, before anything runs; or for runs that cannot be compared.
    """
    from ekd_lightning.cli.train import run_listed_job  # noqa: PLC0415 (slow; --help needs none)
    from ekd_lightning.studies import comparison  # noqa: PLC0415
    from ekd_lightning.studies.launching import working_in  # noqa: PLC0415

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on, instead of printing its own report
    register_schema()
    folder = args.output.absolute()
    old = read_study(folder)
    if args.report_only:
        if old is None:
            raise UserError(f"--output {args.output}: not a study, there is nothing to report")
        _refuse(args, _ONLY_WITH_RUNS, "has no effect on --report-only, which shows all that is there")
        return comparison.report(old, folder)
    if args.methods is None and old is not None:
        _refuse(args, ("match", "no_controls", "tuned"), "is about rows: say which with --methods")
    check_typed(args.overrides)
    common, hydra_words = split_overrides(args.overrides)
    hydra_words = tuple(anchored_search(word) for word in hydra_words)
    common, again = tuple(anchored(word) for word in common), f"{PROGRAM} --output {typed(folder)}"
    search = [word for word in hydra_words if key_of(word) == "hydra.searchpath"]
    again = " ".join([again, *map(shell_word, (*search, *filter(names_code, common)))])
    tuned = args.tuned.absolute() if args.tuned and args.tuned.exists() else args.tuned
    with (
        users_files_first(hydra_words),
        initialize_config_module("ekd_lightning.conf", version_base="1.3", job_name="train"),
        DirectoryLock(folder),
    ):
        if hydra_words:
            _compose(hydra_words, [])  # a launcher that is not there is refused before anything is planned
        old = read_study(folder)  # again: another process may have added to it
        composer = partial(_compose, search)
        with working_in(old.working_directory if old else ""):
            study = comparison.ask(
                old,
                common,
                composer,
                methods=args.methods,
                fractions=() if args.fractions is None else parse_numbers("--fractions", args.fractions),
                seeds=() if args.seeds is None else parse_numbers("--seeds", args.seeds),
                match=args.match,
                controls=not args.no_controls,
                tuned=tuned,
            )
            if args.print_jobs:
                jobs, _ = comparison.plan(study, folder, composer, retry_failed=args.retry_failed)
                write_study(study, folder)  # for --report-only, once the jobs have run
                for line in comparison.commands(jobs):
                    print(line)
                return True
            comparison.run(
                study, folder, composer, hydra_words, run_listed_job, command=again, retry_failed=args.retry_failed
            )
    complete = comparison.report(study, folder)
    more = ",".join(str(max(study.seeds) + number) for number in (1, 2))
    print_next(report_command([folder], folder / "report"), f"{again} --seeds {more}" if complete else again)
    return complete


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuses options that would be ignored."""
    for name in names:
        value = getattr(args, name)
        if value:
            word = value[0] if name == "overrides" else f"--{name.replace('_', '-')}"
            raise UserError(f"{word}: {why}")


def _compose(search: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    return compose("train", overrides=[*search, *overrides])


if __name__ == "__main__":
    main()
