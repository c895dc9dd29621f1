"""`ekd-evaluate`: further evaluation of finished runs, added to their records."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ekd_lightning.config.commands import print_next, report_command, trusting, typed, unused
from ekd_lightning.config.config import recorded_settings
from ekd_lightning.config.edge import make_parser, parse_names, run_command
from ekd_lightning.config.output import print_table
from ekd_lightning.errors import UserError
from ekd_lightning.keys import is_location, keys_where
from ekd_lightning.progress import importing, phase, session
from ekd_lightning.runs.collection import finished_runs
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.settings import EVALUATION_PARTS, EvaluationSettings
from ekd_lightning.studies.sweep import sweep_of

if TYPE_CHECKING:
    import torch

    from ekd_lightning.pipeline.evaluation import Outcome

PROGRAM = "ekd-evaluate"
PARTS = {
    "predictions": "calibration, subsets of branches, diversity, similarity to the teachers, classes",
    "generalisation": "accuracy and NLL on the training images, and the gap to the test images",
    "flatness": "sharpness, and the loss along random directions around the weights",
    "corruptions": "accuracy and calibration on corrupted test images",
    "efficiency": "size, latency, throughput and memory of the student as it is deployed",
}

EXAMPLES = """\
examples:
  ekd-evaluate outputs/cifar10/ekd/2026-01-31_12-00-00                  standard parts that are missing
  ekd-evaluate multirun/2026-01-31/12-00-00 --parts all                 every finished run of a sweep, all parts
  ekd-evaluate RUN --parts flatness,corruptions --device cuda
  ekd-evaluate RUN --force data.root=/data teachers.store=/shared/store   again, with data and teachers elsewhere

Results are added to result.json and arrays.npz of the run; docs/evaluation.md defines every field.
"""
_HEADS = ("run", "method", "accuracy %", "mean branch %", "ECE", "ECE calibrated", "parts")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-evaluate`; exit code 1 if the evaluation of a run failed, 2 for a user's mistake."""
    what = "Evaluate finished runs further and add the results to their records.\n\nparts:\n"
    parser = make_parser(PROGRAM, what + "\n".join(f"  {name:15} {text}" for name, text in PARTS.items()), EXAMPLES)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN",
        help="directory of a run, or a folder with runs; KEY=VALUE names new places of data and teachers",
    )
    standard = ",".join(EvaluationSettings().parts)
    parser.add_argument("--parts", default=standard, help=f"names, or all (default: {standard})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--batch-size", type=int, help="images per forward pass (default: the run's)")
    parser.add_argument("--force", action="store_true", help="evaluate parts again that a run already has")
    trust = "import the modules that the runs' records name (or: imports=[NAME,...])"
    parser.add_argument("--trust", action="store_true", help=trust)
    run_command(parser, run_evaluate, argv)


def run_evaluate(args: argparse.Namespace) -> bool:
    """Evaluates every run and prints a table of the results.

    Returns:
        Whether every run has all requested parts now.

    Raises:
        UserError: For a user's mistake, before anything is evaluated.
    """
    overrides = [word for word in args.words if is_override(word)]
    parts = parse_names("--parts", args.parts, (*EVALUATION_PARTS, "all"))
    if "all" in parts:
        parts = list(EVALUATION_PARTS)
    if args.batch_size is not None:
        if args.batch_size < 1:
            raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
        overrides.append(f"data.eval_batch_size={args.batch_size}")
    places = [Path(word) for word in args.words if not is_override(word)]
    runs, left_out = finished_runs(places)
    for line in left_out:
        print(line, file=sys.stderr)
    rows: list[tuple[str | Text, ...]] = []
    complete, found = True, False
    with session("data", "evaluation") as shown:
        with phase("data"), importing("PyTorch"):
            device = choose_device(args.device)
        for position, directory in enumerate(runs, 1):
            print(f"[{position}/{len(runs)}] {directory}", file=sys.stderr, flush=True)
            try:
                outcome = _evaluate(directory, parts, overrides, device, force=args.force, trust=args.trust)
            except UserError as error:
                if len(runs) == 1:
                    raise
                complete = False
                print(f"{PROGRAM}: error: {error}", file=sys.stderr)
                rows.append((str(directory), "", "", "", "", "", Text("failed", "red")))
                continue
            complete = complete and not outcome.errors
            found = found or bool(outcome.done or outcome.skipped)
            for line in outcome.errors.values():
                print(f"{PROGRAM}: error: {directory}: {line}", file=sys.stderr)
            rows.append(_row(directory, outcome))
            if position < len(runs):
                shown.renew()
    print_table("evaluated runs", _HEADS, rows, left=("run", "method", "parts"))
    if found:
        print_next(*_commands(runs, places, args))
    return complete


def _commands(runs: Sequence[Path], places: Sequence[Path], args: argparse.Namespace) -> list[str]:
    """The next commands: a report of all runs; for a single run, a report in its directory and the export."""
    if len(runs) > 1:
        return [report_command(places, unused("report"))]
    (run,) = runs
    kept = [word for word in args.words if is_override(word) and word.startswith(("data.", "imports="))]
    export = f"ekd-export {' '.join([typed(run), *trusting(kept, args.trust)])}"
    return [report_command([run], run / "report"), *([] if (run / "export").exists() else [export])]


def is_override(word: str) -> bool:
    """Whether a word is an override; a folder with such a name can be given as ./NAME=...

    Raises:
        UserError: For a key that a finished run cannot change.
    """
    found = re.match(r"([A-Za-z_][\w.]*)=", word)
    if not found:
        return False
    key = found[1]
    if key == "evaluation.parts":
        raise UserError(f"{word}: give the parts with --parts, e.g. --parts flatness,corruptions")
    if not is_location(key) and key != "imports":
        raise UserError(f"{word}: a finished run keeps its settings; you may set {', '.join(keys_where(is_location))}")
    return True


def choose_device(name: str) -> torch.device:
    """The device of `--device auto`, `cpu` or `cuda`.

    Raises:
        UserError: For `cuda` without a CUDA device.
    """
    import torch  # noqa: PLC0415

    from ekd_lightning.teachers.hardware import device_type_of  # noqa: PLC0415

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device, or PyTorch does not see it")
    return torch.device(device_type_of(name))


def _evaluate(
    directory: Path, parts: Sequence[str], overrides: Sequence[str], device: torch.device, *, force: bool, trust: bool
) -> Outcome:
    with phase("data"), importing("PyTorch and Lightning"):
        from ekd_lightning.pipeline.context import open_context  # noqa: PLC0415
        from ekd_lightning.pipeline.evaluation import evaluate_finished_run  # noqa: PLC0415
        from ekd_lightning.tracking.dashboards import log_evaluation_run  # noqa: PLC0415

    run = RunWriter(directory)
    settings = recorded_settings(run, overrides, trust=trust)
    if run.finished_result().partial:
        raise UserError(f"{directory}: the run used part of the data only (a debugging run); it cannot be evaluated")
    with phase("data"):
        context = open_context(run, settings, device)
    outcome = evaluate_finished_run(context, run, parts, force=force)
    if outcome.done:
        log_evaluation_run(
            settings.logger,
            outcome.result,
            run.arrays,
            context.dataset,
            directory,
            config=run.config(),
            sweep=sweep_of(directory),
        )
    return outcome


def _row(directory: Path, outcome: Outcome) -> tuple[str | Text, ...]:
    result = outcome.result
    parts = [*map(Text, outcome.done), *(Text(f"{name} (already done)", "dim") for name in outcome.skipped)]
    parts += [Text(f"{name} failed", "red") for name in outcome.errors]
    return (
        str(directory),
        str(result.get("method")),
        _number(result.get("test_accuracy"), 100, 2),
        _number(result.get("test_mean_branch_accuracy"), 100, 2),
        _number(result.get("test_ece"), 1, 4),
        _number(result.get("test_ece_calibrated"), 1, 4),
        Text(", ").join(parts),
    )


def _number(value: Any, factor: int, digits: int) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


if __name__ == "__main__":
    main()
