"""`ekd-tune`: searches a method's weights and temperature on the validation split, with a fixed budget of trials."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ekd_lightning.config.edge import ConsoleLines, check_options, is_interrupt, make_parser, run_command
from ekd_lightning.config.overrides import check_typed
from ekd_lightning.errors import UserError
from ekd_lightning.progress import importing, phase, session
from ekd_lightning.roles import COUNT, COUNT_OR_NONE, POSITIVE
from ekd_lightning.studies.rows import read_tuned
from ekd_lightning.studies.study import parse_numbers

PROGRAM = "ekd-tune"
EXAMPLES = """\
examples:
  ekd-tune --trials 20 --output tuned/c10 method=ekd experiment=cifar10_limited
  ekd-tune --trials 20 --output tuned/c10 method=kd_mean experiment=cifar10_limited   the same budget
  ekd-tune --trials 20 --output tuned/lr --space space.yaml --epochs 15 --seeds 0,1 method=ce
  ekd-train method=ekd experiment=cifar10_limited $(ekd-tune --print tuned/c10/ekd.yaml)

The same command continues a stopped search; several at once share it. The test set is not read.
Overrides are those of ekd-train; a setting that they fix is not searched. See docs/tuning.md.
"""

# Loggers whose lines reach the terminal; --verbose shows those of every run, too.
_SHOWN_LOGGERS = (
    "ekd_lightning.studies.rows",
    "ekd_lightning.studies.search",
    "ekd_lightning.training.pool",
    "ekd_lightning.progress_lines",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-tune`; exit code 2 for a user's mistake."""
    run_command(_parser(), run_tune, argv, level=None)


def _parser() -> argparse.ArgumentParser:
    what = "Choose a method's weights and temperature on the validation split."
    parser = make_parser(PROGRAM, what, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for ekd-train")
    parser.add_argument("--output", type=Path, help="folder for <method>.yaml and the trials")
    parser.add_argument("--trials", type=int, default=20, help="number of trials, earlier ones included (default: 20)")
    parser.add_argument("--epochs", type=int, help="epochs of a trial (default: recipe.epochs)")
    parser.add_argument("--seeds", default="0", help="seeds of a trial; its value is their mean (default: 0)")
    parser.add_argument("--timeout", type=float, metavar="S", help="start no trial after S seconds")
    parser.add_argument("--space", type=Path, metavar="FILE", help="YAML: key -> {low, high, log} or {choices}")
    parser.add_argument("--sampler-seed", type=int, default=0, help="seed of the sampler (default: 0)")
    parser.add_argument("--no-prune", action="store_true", help="train every trial to its end")
    parser.add_argument("--storage", metavar="URL", help="database of the trials, e.g. sqlite:///tuned.db")
    parser.add_argument("--verbose", action="store_true", help="show the log lines of every run")
    parser.add_argument("--print", type=Path, metavar="FILE", help="print the overrides of a result, and stop")
    return parser


def run_tune(args: argparse.Namespace) -> None:
    """Searches, or with `--print` prints the overrides that an earlier search found.

    Raises:
        UserError: For a user's mistake.
    """
    if args.print:
        print(*read_tuned(args.print)["overrides"], sep="\n")
        return
    handler = ConsoleLines(sys.stderr)
    handler.addFilter(lambda r: args.verbose or r.levelno >= logging.WARNING or r.name in _SHOWN_LOGGERS)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if args.output is None:
        raise UserError("--output: must be given, e.g. --output tuned/c10; <method>.yaml and the trials go there")
    check_options(args, trials=COUNT, epochs=COUNT, sampler_seed=COUNT_OR_NONE, timeout=POSITIVE)
    check_typed(args.overrides)
    seeds = parse_numbers("--seeds", args.seeds)
    with session("plan", keep=False), phase("plan"), importing("PyTorch and Lightning"):
        try:
            import optuna  # noqa: F401, PLC0415
        except ModuleNotFoundError:
            raise UserError("ekd-tune needs Optuna: pip install 'ekd-lightning[tune]'") from None
        from ekd_lightning.studies.search import tune  # noqa: PLC0415 (slow; --help needs none)

    try:
        tune(
            args.overrides,
            args.output,
            trials=args.trials,
            seeds=seeds,
            epochs=args.epochs,
            space_file=args.space,
            timeout=args.timeout,
            sampler_seed=args.sampler_seed,
            prune=not args.no_prune,
            storage=args.storage,
        )
    except (KeyboardInterrupt, SystemExit) as stop:
        if not is_interrupt(stop):
            raise
        raise KeyboardInterrupt("the same command continues the search") from None


if __name__ == "__main__":
    main()
