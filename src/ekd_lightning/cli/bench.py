"""`ekd-bench`: the speed of this package against a plain PyTorch loop, on this machine and the same work."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ekd_lightning.cli.train import quiet_libraries
from ekd_lightning.config.config import compose_settings
from ekd_lightning.config.edge import one_line
from ekd_lightning.errors import UserError
from ekd_lightning.files import write_json

if TYPE_CHECKING:
    from ekd_lightning.bench.parts import Bench
    from ekd_lightning.settings import Settings

PROGRAM = "ekd-bench"
PARTS = {
    "a": "the loader alone",
    "b": "each teacher, plain and frozen",
    "c": "a training epoch: plain loop, cold table, warm table, bare loop",
    "i": "Lightning over the bare loop",
    "d": "a sweep of teachers 1, 2, ... x branches 1, 2, 3",
    "e": "inference of the student and of the teachers",
    "g": "growth with teachers, branches, batch size and images",
    "h": "share of the machine's matrix-product peak (runs b and c)",
    "p": "where a training step's time goes, and what its convolutions alone allow",
    "f": "memory of a run of one epoch",
}
GPU_PARTS = "acip"
"""What fits into a few minutes where most of the time goes into compiling."""
_GPU_MINUTES = 3.0
_WIDTH = 120  # where there is no terminal
EXAMPLES = """\
examples:
  ekd-bench                                                    bundled digits, all parts, some minutes
  ekd-bench experiment=cifar10_limited data.fraction=1.0       full CIFAR-10, pretrained teachers
  ekd-bench --parts abc --rounds 5 --output bench.json data=cifar10

Overrides are those of ekd-train. Nothing else should run on the machine meanwhile.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-bench`.

    Args:
        argv: Arguments without the command's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Measure the plain way and this package's in turn, on the same work.\n\nparts:\n"
        + "\n".join(f"  {key}  {text}" for key, text in PARTS.items()),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for ekd-train")
    parser.add_argument("--parts", help=f"letters of the parts (default: all; on a GPU {GPU_PARTS})")
    parser.add_argument(
        "--minutes", type=float, help="begin nothing after so long (default: no limit; on a GPU 3)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of every comparison")
    parser.add_argument("--plain-steps", type=int, default=30, help="steps of the plain loop in a round")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of every training")
    parser.add_argument("--sweep-fraction", type=float, help="share of the data for parts d, g and i")
    parser.add_argument(
        "--sweep-epochs", type=int, default=3, help="epochs of every training of parts d and i"
    )
    parser.add_argument("--output", type=Path, help="JSON file for all numbers")
    args = parser.parse_args(argv)
    unknown = [letter for letter in args.parts or "" if letter not in PARTS]
    if unknown or args.rounds < 1 or args.plain_steps < 1:
        parser.error(
            f"--parts {args.parts} --rounds {args.rounds}: parts are {', '.join(PARTS)}; at least 1 round"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with one_line(PROGRAM):
        bench(args)


def bench(args: argparse.Namespace) -> None:
    """Runs the parts, prints each as it is finished, and writes the JSON file anew after each.

    Raises:
        UserError: For a user's mistake.
    """
    from ekd_lightning.runs.record import provenance  # noqa: PLC0415 (slow; --help needs none)

    quiet_libraries()
    context = _context(args)
    on_gpu = context.device.type == "cuda"
    found: dict[str, Any] = {
        "origin": provenance(),
        "settings": " ".join(args.overrides),
        "rounds": args.rounds,
        "seconds": {"start": time.perf_counter() - context.began},
    }
    chosen = args.parts or (GPU_PARTS if on_gpu else "".join(PARTS))
    for key in (key for key in PARTS if key in chosen):
        if not context.has_time():
            print(f"({key}) {PARTS[key]}: no time left (--minutes)", file=sys.stderr, flush=True)
            continue
        print(f"({key}) {PARTS[key]}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        found[key] = _part(key, context, args, found)
        found["seconds"][key] = time.perf_counter() - start
        _show(key, found[key])
        print(f"({key}) took {found['seconds'][key]:.0f} s", file=sys.stderr, flush=True)
        if args.output:
            write_json(args.output, found)


def _context(args: argparse.Namespace) -> Bench:
    import torch  # noqa: PLC0415

    from ekd_lightning.bench.parts import Bench, worker_counts  # noqa: PLC0415
    from ekd_lightning.pipeline.prepare import prepare  # noqa: PLC0415
    from ekd_lightning.teachers.hardware import resolve_precision  # noqa: PLC0415
    from ekd_lightning.training.allocator import keep_freed_memory  # noqa: PLC0415
    from ekd_lightning.training.pool import gather_teachers  # noqa: PLC0415

    began = time.perf_counter()
    keep_freed_memory()  # as every run does; the plain loop profits too
    settings = compose_settings(f"recipe.epochs={args.epochs}", "trainer.devices=1", *args.overrides)
    accelerator = str(settings.trainer.get("accelerator", "auto"))
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    settings.trainer["precision"] = resolve_precision(settings.trainer.get("precision"), accelerator)
    if settings.recipe.mixed("recipe"):
        raise UserError(f"{settings.recipe.mixed('recipe')}: the plain loop does not mix images")
    # What a long run would choose: the benchmark's own trainings are too short to pay for compiling.
    if settings.teachers.compile == "auto" and not on_gpu:
        settings.teachers.compile = "always"
    if settings.student.compile == "auto":
        long_run = str(settings.trainer["precision"]).startswith("bf16") and not on_gpu
        settings.student.compile = "always" if long_run else "never"
    prepared = prepare(settings, accelerator)
    if settings.method.teacher is not None:
        raise UserError(
            f"method.teacher={settings.method.teacher}: ekd-bench measures all teachers of the pool"
        )
    if prepared.method.teacher_stages or not prepared.teachers:
        raise UserError(
            f"method={settings.method.name}: ekd-bench needs a method with teachers, without their stages"
        )
    device = torch.device("cuda" if on_gpu else "cpu")
    minutes = args.minutes or (_GPU_MINUTES if on_gpu else math.inf)
    return Bench(
        settings,
        prepared.dataset,
        gather_teachers(prepared.teachers).to(device),
        device,
        rounds=args.rounds,
        plain_steps=args.plain_steps,
        workers=worker_counts(device),
        began=began,
        deadline=began + 60 * minutes,
    )


def _part(key: str, bench: Bench, args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    from ekd_lightning.bench import cost, parts, step_profile  # noqa: PLC0415

    if key in "dgi":
        bench = replace(bench, settings=_smaller(bench.settings, args, key))
    if key == "d":
        return parts.sweep(bench)
    if key == "h":
        for needed, also in (("b", parts.teachers_alone), ("c", parts.epoch)):
            if needed not in found:
                found[needed] = also(bench)
        teachers = {
            name: row["rates"]["auto folded, compiled"]["median"]
            for name, row in found["b"]["teachers"].items()
        }
        return cost.peak_share(bench, found["c"]["rates"]["warm table"]["median"], teachers)
    if key == "f":
        return cost.memory(args.overrides)
    measure = {
        "a": parts.loader_alone,
        "b": parts.teachers_alone,
        "c": parts.epoch,
        "e": cost.inference,
        "g": cost.growth,
        "i": parts.overhead,
        "p": step_profile.step_profile,
    }
    return measure[key](bench)


def _smaller(settings: Settings, args: argparse.Namespace, key: str) -> Settings:
    """The settings for the parts that train often; the sweep compiles when ekd-train would."""
    data, recipe = settings.data, settings.recipe
    if args.sweep_fraction is not None:
        data = replace(data, fraction=args.sweep_fraction, per_class=None)
    if key == "g":
        return replace(settings, data=data)
    recipe = replace(recipe, epochs=args.sweep_epochs)
    trainer = {**settings.trainer, "max_epochs": args.sweep_epochs}
    settings = replace(settings, data=data, recipe=recipe, trainer=trainer)
    if key == "d":
        chosen = compose_settings(*args.overrides)
        teachers = replace(settings.teachers, compile=chosen.teachers.compile)
        student = replace(settings.student, compile=chosen.student.compile)
        settings = replace(settings, teachers=teachers, student=student)
    return settings


def _show(key: str, numbers: dict[str, Any]) -> None:
    """One table per part; nested groups become rows."""
    table = Table(title=f"({key}) {PARTS[key]}", title_justify="left")
    for name in ("what", "median", "min", "max", "ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    _rows(table, "", numbers)
    console = Console(file=sys.stdout)
    Console(file=sys.stdout, width=max(console.width, _WIDTH)).print(table)


def _rows(table: Table, name: str, value: Any) -> None:
    if isinstance(value, dict) and "median" in value:
        numbers = (f"{value[field]:,.0f}" for field in ("median", "min", "max"))
        table.add_row(name, *numbers, f"{value['ratio']:.2f}")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _rows(table, f"{name} {key}".strip() if key != "rates" else name, inner)
    else:
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value), "", "", "")


if __name__ == "__main__":
    main()
