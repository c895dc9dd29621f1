"""`ekd-export`: the student of a finished run as checked files for deployment, with a model card."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ekd_lightning.config.commands import print_next, report_command, trusting, typed
from ekd_lightning.config.config import recorded_settings
from ekd_lightning.config.edge import check_options, make_parser, parse_names, run_command
from ekd_lightning.config.output import print_table
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.keys import is_location, keys_where
from ekd_lightning.progress import phase, session
from ekd_lightning.roles import COUNT
from ekd_lightning.runs.directory import RunDirectory, RunState
from ekd_lightning.runs.lock import check_directory
from ekd_lightning.runs.result import Result
from ekd_lightning.studies.study import STUDY_FILE, read_runs, read_study

if TYPE_CHECKING:
    from ekd_lightning.pipeline.evaluation import EvaluationContext
    from ekd_lightning.pipeline.export import ExportOptions

PROGRAM = "ekd-export"
_BEST = "best"
PLACES = keys_where(lambda key: is_location(key) and key.startswith("data."))
EXAMPLES = """\
examples:
  ekd-export RUN                                          RUN/export/student.safetensors and a model card
  ekd-export RUN --format onnx,torch-export -o exported   for ONNX Runtime, and for PyTorch alone
  ekd-export RUN --format onnx --int8                     also quantised to int8, with its accuracy
  ekd-export RUN --branches best                          the branch with the highest validation accuracy, alone
  ekd-export RUN --fold                                   all branches in one head, at the cost of a plain student
  ekd-export RUN data.root=/data                          if the data have moved
  ekd-export STUDY -o students                            the student of each row, in a folder of its own

RUN is the directory of a finished run, STUDY the folder of ekd-compare. In Python, without Lightning or Hydra:
  model = ekd_lightning.load("RUN/export/student.safetensors"); logits = model(images)

Every file is read back and compared with the student on all test images. See docs/export.md.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-export`; exit code 1 if a file failed its check, 2 for a user's mistake."""
    what = "Export the student of a finished run, check the files, and write a model card."
    parser = make_parser(PROGRAM, what, EXAMPLES)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="directory of a finished run, or folder of a study")
    add("overrides", nargs="*", metavar="KEY=VALUE", help=f"new places of the data: {', '.join(PLACES)}")
    add("--format", default="safetensors", help="safetensors (default), onnx, torch-export, or several: a,b")
    add("-o", "--output", type=Path, help="folder for the files (default: RUN/export)")
    add("--branches", help="which branches to keep, counted from 0, e.g. 0,2, or best (default: all)")
    add("--weights", default="last", help="last (default), best (by validation accuracy) or ema (moving average)")
    add("--fold", action="store_true", help="fold branches that are linear heads into one head, which is exact")
    add("--no-fold-batch-norm", action="store_true", help="do not fold batch norms into convolutions")
    add("--probabilities", action="store_true", help="return probabilities besides logits")
    add("--int8", action="store_true", help="also an ONNX file quantised to int8")
    add("--calibration-images", type=int, help="training images that calibrate int8 (default: 512)")
    add("--max-drop", type=float, help="accuracy in [0, 1] that int8 may lose (default: 0.02)")
    add("--license", help="identifier for the model card's header, e.g. mit (default: left to you)")
    add("--push", metavar="USER/REPO", help="upload to the Hugging Face hub; a new repository is private")
    add("--force", action="store_true", help="overwrite existing files")
    add("--trust", action="store_true", help="import the modules that the run's record names (or: imports=[NAME,...])")
    run_command(parser, run_export, argv, level=logging.WARNING)


def run_export(args: argparse.Namespace) -> bool:
    """Exports the student and prints the checks of its files.

    Returns:
        Whether all files passed their checks; a file that failed is removed.

    Raises:
        UserError: For a user's mistake, before anything is written.
    """
    for word in args.overrides:
        if word.partition("=")[0] not in (*PLACES, "imports") or "=" not in word:
            raise UserError(f"{word}: a finished run keeps its settings; you may set {', '.join(PLACES)}")
    if (args.run / STUDY_FILE).is_file():
        return _export_study(args)
    made = _export_run(args)
    if made.card is not None:
        _show(made.record, args.output or args.run / "export")
        print(made.card)
    if made.card is not None and not made.failure:
        _print_accuracy(made.record, made.result)
        if args.push:
            from ekd_lightning.networks.hub import push  # noqa: PLC0415 (slow; --help needs none)

            print(f"uploaded: {push(args.output or args.run / 'export', args.push)}")
        words = [typed(args.run), "--parts", "all", *trusting(args.overrides, args.trust)]
        evaluate = [f"ekd-evaluate {' '.join(words)}"] if made.result.lacks_evaluation else []
        print_next(*evaluate, report_command([args.run], args.run / "report"))
    if made.failure:
        print(f"{PROGRAM}: error: {made.failure}", file=sys.stderr)
    return not made.failure


def _export_study(args: argparse.Namespace) -> bool:
    """Exports the student of each row of a study, of its lowest finished seed, and prints a table of them.

    A row that cannot be exported does not stop the others.

    Returns:
        Whether all rows were exported.
    """
    if args.push:
        raise UserError(f"--push: uploads one student, and {args.run} is a study; name one of its runs")
    study, top, cells, failed = read_study(args.run), args.output or args.run / "export", [], 0
    assert study is not None  # it has the file
    _options(args)
    for fraction, rows in read_runs(study, args.run).items():
        for row, runs in rows.items():
            name = row if len(study.fractions) == 1 else f"{row}-f{fraction:g}"
            seed = min((seed for seed, run in runs.items() if run.state is RunState.DONE), default=None)
            test, where = "", "no finished run"
            if seed is not None:
                one = {**vars(args), "run": runs[seed].directory, "output": top / name}
                try:
                    made = _export_run(argparse.Namespace(**one))
                    failure = made.failure
                except UserError as error:
                    failure = str(error)
                if failure:
                    print(f"{PROGRAM}: error: row {name}: {failure}", file=sys.stderr)
                    where = "failed"
                else:
                    test, where = f"{100 * made.record['test_metrics']['accuracy']:.2f}", typed(top / name)
            failed += not test
            cells.append([name, "" if seed is None else str(seed), test, where])
    print_table(f"{top}: one student of each row", ("row", "seed", "test %", "folder"), cells, left=("row", "folder"))
    return not failed


class _Exported(NamedTuple):
    """What the export of a run's student made.

    Attributes:
        record: Content of export.json.
        result: The run's.
        card: The line on the model card; None if there is no file.
        failure: The line on a file that failed its check; None if all passed.
    """

    record: dict[str, Any]
    result: Result
    card: str | None
    failure: str | None


def _export_run(args: argparse.Namespace) -> _Exported:
    """Exports the student of a run."""
    folder = args.output or args.run / "export"
    failure, card = None, None
    with session("data", "export"):
        with phase("data"):
            from ekd_lightning.pipeline import export  # noqa: PLC0415 (slow; --help needs none)
            from ekd_lightning.reporting import model_card  # noqa: PLC0415

            options = _with_best_branch(args, _options(args))
            if args.output:
                check_directory(folder)
            export.refuse_existing(folder, options, args.force)
            model_card.refuse_foreign_card(folder, export.read_export(folder), force=args.force)
            context, provenance = _open(args, options)
        with phase("export", len(options.files), "files"), export.exporting(folder):
            try:
                record = export.export_student(context, provenance, folder, options, force=args.force)
            except export.CheckFailedError as error:
                failure, record = str(error), export.read_export(folder) or {}
            if record.get("files"):
                card = model_card.write_card(record, context.result, folder, license_id=args.license, force=args.force)
    return _Exported(record, context.result, card, failure)


def _options(args: argparse.Namespace) -> ExportOptions:
    """Checks all options that need no file of the run.

    Raises:
        UserError: At the first impossible value.
    """
    from ekd_lightning.networks.deploy import SUFFIXES  # noqa: PLC0415
    from ekd_lightning.pipeline.export import WEIGHTS, ExportOptions  # noqa: PLC0415

    formats = tuple(parse_names("--format", args.format, SUFFIXES))
    if args.weights not in WEIGHTS:
        raise unknown_name("--weights", args.weights, WEIGHTS)
    if args.int8 and "onnx" not in formats:
        raise UserError(
            f"--int8 --format {args.format}: needs the format onnx, as ONNX Runtime quantises; PyTorch has no "
            "quantiser for exported programs, and safetensors holds weights only"
        )
    if args.output is not None and args.output.suffix in SUFFIXES.values():
        raise UserError(f"-o {args.output}: must be a folder; the file in it is called student{args.output.suffix}")
    check_options(args, calibration_images=COUNT)
    if args.max_drop is not None and not 0 <= args.max_drop <= 1:
        raise UserError(f"--max-drop {args.max_drop}: must lie in [0, 1]")
    given = {name: getattr(args, name) for name in ("calibration_images", "max_drop")}
    of_int8 = {name: value for name, value in given.items() if value is not None}
    if of_int8 and not args.int8:
        raise UserError(f"--{next(iter(of_int8)).replace('_', '-')}: has no effect without --int8")
    if args.push:
        if "safetensors" not in formats:
            raise UserError("--push: ekd_lightning.load reads only safetensors from a repository; add it to --format")
        from ekd_lightning.networks.hub import check_repository  # noqa: PLC0415

        check_repository(args.push)
    return ExportOptions(
        formats,
        branches=_branches(args.branches),
        weights=args.weights,
        fold_branches=args.fold,
        fold_batch_norm=not args.no_fold_batch_norm,
        probabilities=args.probabilities,
        int8=args.int8,
        **of_int8,
    )


def _branches(text: str | None) -> tuple[int, ...] | None:
    """The positions that --branches names; None for all, or as long as `best` is not known."""
    if text in (None, _BEST):
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--branches {text}: must be {_BEST}, or whole numbers separated by commas, e.g. 0,2") from None


def _with_best_branch(args: argparse.Namespace, options: ExportOptions) -> ExportOptions:
    """The options with the branch that `--branches best` stands for, see `Result.chosen_branch`."""
    if args.branches != _BEST:
        return options
    if options.weights != "last":
        raise UserError(f"--branches {_BEST} --weights {options.weights}: branches are validated with the last weights")
    result = RunDirectory(args.run).finished_result()
    if result.num_branches == 1:
        return options
    if (chosen := result.chosen_branch) is None:
        raise UserError(f"--branches {_BEST}: the run did not validate several branches; give positions, e.g. 0")
    return replace(options, branches=(chosen,))


def _open(args: argparse.Namespace, options: ExportOptions) -> tuple[EvaluationContext, dict[str, Any]]:
    import torch  # noqa: PLC0415

    from ekd_lightning.networks import cut_branches, fold_branches  # noqa: PLC0415
    from ekd_lightning.pipeline.context import load_own_student, open_context  # noqa: PLC0415
    from ekd_lightning.pipeline.export import load_weights  # noqa: PLC0415

    run = RunDirectory(args.run)
    settings = recorded_settings(run, args.overrides, trust=args.trust)
    run.finished_result()  # refuses a run that is not done
    other = load_weights(run, options.weights) if options.weights != "last" else None
    if options.branches is not None or options.fold_branches:  # refuses before the data are read
        student = other or load_own_student(run)
        student = cut_branches(student, options.branches or range(student.num_branches))
        if options.fold_branches:
            fold_branches(student)
    return open_context(run, settings, torch.device("cpu"), other, options.weights), run.provenance()


def _show(record: dict[str, Any], folder: Path) -> None:
    title = f"{folder}: checked on {record['test_metrics']['images']:,} test images"
    heads = ("file", "precision", "kB", "accuracy %", "Δ accuracy", "max |Δlogit|", "allowed", "changed")
    rows = (
        (
            name,
            facts["precision"] + (", batch norm folded" if facts["folded"] else ""),
            f"{facts['bytes'] / 1000:,.1f}",
            f"{100 * facts['accuracy']:.2f}",
            f"{100 * facts['accuracy_difference']:+.2f}",
            f"{facts['max_difference']:.2g}",
            "" if facts["tolerance"] is None else f"{facts['tolerance']:.2g}",
            str(facts["changed"]),
        )
        for name, facts in record["files"].items()
    )
    print_table(title, heads, rows, left=("file", "precision"))


def _print_accuracy(record: dict[str, Any], result: Mapping[str, Any]) -> None:
    student = record["student"]
    recorded = result.get("test_accuracy" + ("" if student["weights"] == "last" else f"_{student['weights']}"))
    whole = len(student["branches"]) == student["of_branches"]
    compared = f"; the run recorded {100 * recorded:.2f} %" if whole and recorded is not None else ""
    print(f"test accuracy of the student in float32: {100 * record['test_metrics']['accuracy']:.2f} %{compared}")


if __name__ == "__main__":
    main()
