"""`ekd-compare`: methods × fractions × seeds as one resumable study with one table."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from ekd_lightning.config.commands import print_next, report_command, typed
from ekd_lightning.config.config import register_schema
from ekd_lightning.config.edge import make_parser, run_command
from ekd_lightning.config.overrides import anchored, anchored_search, check_typed, key_of, shell_word
from ekd_lightning.errors import UserError
from ekd_lightning.progress import importing, phase, session
from ekd_lightning.runs.directory import RunState
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.words import names_code
from ekd_lightning.runs.writer import now
from ekd_lightning.studies.study import (
    RUNS,
    STUDY_FILE,
    Composer,
    Study,
    every_run,
    parse_numbers,
    read_earlier,
    read_runs,
    read_study,
    split_overrides,
    union,
    write_study,
)
from ekd_lightning.studies.sweep import Job, Sweep

if TYPE_CHECKING:
    from ekd_lightning.studies.declaration import Declaration, Part

    Declared = tuple[Declaration, Declaration]
    Planned = dict[Path, tuple[Study, Study, list[Job]]]

PROGRAM = "ekd-compare"
EXAMPLES = """\
examples:
  ekd-compare --methods ce,kd_mean,ekd --fractions 0.1 --seeds 0,1,2 --output compare/c10 experiment=cifar10_limited
  ekd-compare --methods ekd,kd_mean@resnet14 --output compare/digits recipe.epochs=5
  ekd-compare --output compare/c10                   continue it: done runs are skipped, stopped ones resumed
  ekd-compare --output compare/c10 --seeds 3,4       two more seeds
  ekd-compare --output compare/c10 --report-only     the table alone
  ... hydra/launcher=parallel hydra.launcher.n_jobs=2      two runs at a time, one thread each
  ekd-compare --study full --output runs/study       the study that conf/study/full.yaml declares; repeat to continue
  ekd-compare --study full --output runs/study --only cifar10-10,ekd,camkd     one part and two rows of it

Overrides are those of ekd-train and apply to all rows. See docs/comparing.md.
"""
_ONLY_WITH_RUNS = (
    *("methods", "fractions", "seeds", "match", "no_controls", "tuned"),
    *("print_jobs", "retry_failed", "overrides"),
)
_PATIENCE_SECONDS = 3600.0  # to wait for another process that is planning in the folder


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-compare`; exit code 1 if a run failed or is missing, 2 for a user's mistake."""
    what = "Run methods × fractions × seeds as one resumable study and compare them in one table."
    parser = make_parser(PROGRAM, what, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for ekd-train")
    parser.add_argument("--methods", help="rows: a method, or method@network for a plain student, e.g. ce,ekd")
    parser.add_argument("--fractions", help="shares of the training images (default: that of the settings)")
    parser.add_argument("--seeds", help="default: 0,1,2; of a declared study, the seeds to run (default: all)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the study")
    parser.add_argument("--study", help="a declared study: a file of conf/study, or the path of a .yaml file")
    parser.add_argument("--only", help="parts and rows of the declared study to run (default: all)")
    parser.add_argument(
        "--match", help="add plain students of the same cost, by macs,parameters (default), one of them, or none"
    )
    parser.add_argument("--no-controls", action="store_true", help="add no controls and no matched students")
    parser.add_argument("--tuned", type=Path, help="folder of <row>.yaml files from ekd-tune")
    parser.add_argument("--report-only", action="store_true", help="run nothing, only write and print the tables")
    parser.add_argument("--print-jobs", action="store_true", help="print the command of every run, and stop")
    parser.add_argument("--retry-failed", action="store_true", help="run failed runs again")
    run_command(parser, run_compare, argv)


def run_compare(args: argparse.Namespace) -> bool:
    """Runs what is missing, then reports.

    Returns:
        Whether all runs that are asked for are done.

    Raises:
        UserError: For a user's mistake, before anything runs; or for runs that cannot be compared.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on, instead of printing its own report
    register_schema()
    folder, declared = args.output.absolute(), _declared(args)
    if args.report_only:
        if any(map(read_study, _places(args, declared))):
            _refuse(args, _ONLY_WITH_RUNS, "has no effect with --report-only, which reports all runs of the study")
        return _report(args, declared)
    if args.methods is None and declared is None and folder.exists():
        _refuse(args, ("match", "no_controls", "tuned"), "applies to rows that are added; name them with --methods")
    check_typed(args.overrides)
    common, hydra_words = split_overrides(args.overrides)
    common, hydra_words = tuple(map(anchored, common)), tuple(map(anchored_search, hydra_words))
    search = [word for word in hydra_words if key_of(word) == "hydra.searchpath"]
    again = " ".join([f"{PROGRAM} --output {typed(folder)}", *map(shell_word, (*search, *filter(names_code, common)))])
    if declared:
        again = " ".join(map(shell_word, (PROGRAM, *sys.argv[1:])))
    with session("plan", keep=False), phase("plan"), importing("PyTorch and Lightning"):
        from ekd_lightning.cli.train import run_shared_job  # noqa: PLC0415 (slow; --help needs none)
        from ekd_lightning.studies import planning  # noqa: PLC0415
        from ekd_lightning.studies.launching import launch, working_in  # noqa: PLC0415
    since = now()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3", job_name="train"):
        if hydra_words:
            _compose(hydra_words, [])  # refuses an unknown launcher before anything is planned
        planned = _plan(args, declared, common, partial(_compose, search))
        if args.print_jobs:
            for line in (line for *_, jobs in planned.values() for line in planning.commands(jobs, search)):
                print(line)
            return True
        for place, (study, _, jobs) in planned.items():
            if jobs:
                sweep = Sweep(place / RUNS, tuple(jobs))
                with working_in(study.working_directory):
                    launch(jobs, sweep, hydra_words, partial(run_shared_job, since=since), again)
    complete = _report(args, declared)
    studies = {place: asked if declared else read_study(place) or study for place, (study, asked, _) in planned.items()}
    print_next(report_command([folder], folder / "report"), *_following(studies, declared, again, complete=complete))
    asked_for = [run for place, (_, asked, _) in planned.items() for run in every_run(read_runs(asked, place))]
    return all(run.state is RunState.DONE for run in asked_for)


def _following(
    studies: Mapping[Path, Study], declared: Declared | None, again: str, *, complete: bool
) -> Iterator[str]:
    """The command that continues the studies, that runs failed runs again, or that adds seeds; none if all is done."""
    if declared is None and complete:
        (study,) = studies.values()
        again += f" --seeds {','.join(str(max(study.seeds) + n) for n in (1, 2))}"
    elif complete:
        return
    entries = [run for place, study in studies.items() for run in every_run(read_runs(study, place))]
    if "--retry-failed" not in again and any(entry.state is RunState.FAILED for entry in entries):
        again += " --retry-failed"  # else they would be skipped again
    yield again


def _declared(args: argparse.Namespace) -> Declared | None:
    """The declared study that `--study` names: all of it, and what `--only` and `--seeds` select; None without."""
    from ekd_lightning.studies import declaration  # noqa: PLC0415 (slow; --help needs none)

    if args.study is None:
        if args.only:
            raise UserError("--only: has an effect only with --study, whose parts and rows it names")
        return None
    _refuse(args, ("methods", "fractions", "match", "no_controls"), "has no effect with --study, which declares it")
    if (args.output / STUDY_FILE).is_file():
        raise UserError(f"--output {args.output}: holds a study that is not declared; give --study another folder")
    whole = declaration.read_declaration(args.study)
    seeds = () if args.seeds is None else parse_numbers("--seeds", args.seeds)
    return whole, whole.only([name.strip() for name in (args.only or "").split(",") if name.strip()], seeds)


def _places(args: argparse.Namespace, declared: Declared | None) -> dict[Path, Part | None]:
    """The folders of `ekd-compare`'s studies: one, or one for each part of a declared study."""
    folder = args.output.absolute()
    return {folder: None} if declared is None else {folder / part.name: part for part in declared[1].parts}


def _plan(args: argparse.Namespace, declared: Declared | None, common: tuple[str, ...], composer: Composer) -> Planned:
    """Writes each study.json and logs a declared study's cost.

    Returns:
        By folder: its study, the part of it that the command asks for, and the remaining jobs of that part.
    """
    from ekd_lightning.studies import cost, declaration, planning  # noqa: PLC0415 (slow; --help needs none)
    from ekd_lightning.studies.launching import working_in  # noqa: PLC0415

    planned: Planned = {}
    tuned = args.tuned.absolute() if args.tuned and args.tuned.exists() else args.tuned
    for place, part in _places(args, declared).items():
        with DirectoryLock(place, patience=_PATIENCE_SECONDS), session("plan", keep=False), phase("plan"):
            old = read_earlier(place, planned=part is not None or args.methods is not None)
            with working_in(old.working_directory if old else ""):
                if declared and part:
                    asked = declaration.study_of(declared[1], part, common, old, composer, tuned)
                else:
                    asked = planning.build_study(
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
                study = union(old, asked) if old else asked
                if not (study.declaration and asked.rows):  # an undeclared study, or nothing is named
                    asked = study
                jobs = planning.plan(study, place, composer, retry_failed=args.retry_failed, asked=asked)
            write_study(study, place)
        planned[place] = study, asked, jobs
    if declared:
        cost.log_cost({place: (study, jobs) for place, (study, _, jobs) in planned.items()}, composer)
    return planned


def _report(args: argparse.Namespace, declared: Declared | None) -> bool:
    """Writes the tables and prints the missing runs of a declared study; returns whether all runs are done."""
    from ekd_lightning.studies import comparison  # noqa: PLC0415 (slow; --help needs none)

    studies = {place: study for place in _places(args, declared) if (study := read_study(place)) is not None}
    if not studies:
        raise UserError(f"--output {args.output}: holds no study to report on")
    missing = [comparison.not_run(one, args.output) for one in declared or ()]  # refuses a changed declaration
    complete = [comparison.report(study, place) for place, study in studies.items()].count(False) == 0
    if declared is None:
        return complete
    for line in missing[0]:
        print(f"not run: {line}")
    return not missing[1]  # of the selected parts and rows; others need not be done


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuses the options among `names` that were given; `why` says why they would be ignored."""
    for name in names:
        value = getattr(args, name)
        if value:
            word = value[0] if name == "overrides" else f"--{name.replace('_', '-')}"
            raise UserError(f"{word}: {why}")


def _compose(search: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    return compose("train", overrides=[*search, *overrides])


if __name__ == "__main__":
    main()
