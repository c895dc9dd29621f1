"""`ekd-bench`: the speed of this package against a plain PyTorch loop, on this machine and the same work."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ekd_lightning.config.commands import print_next
from ekd_lightning.config.edge import check_options, make_parser, run_command
from ekd_lightning.config.output import print_table
from ekd_lightning.config.overrides import check_typed, shell_word
from ekd_lightning.errors import UserError
from ekd_lightning.files import write_json, write_text
from ekd_lightning.progress import importing, part, phase, session
from ekd_lightning.roles import COUNT, POSITIVE, SHARE
from ekd_lightning.runs.lock import check_directory

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
    "p": "where a training step's time goes, and the rate of its convolutions alone",
    "f": "memory of a run of one epoch",
    "l": "a folder of images: cold and warm cache, and torchvision's ImageFolder",
}
GPU_PARTS = "acip"
"""The default parts on a GPU: they fit into a few minutes, most of which go into compiling."""
_COUNTS = {"rounds": 3, "plain_steps": 30, "epochs": 1, "sweep_epochs": 3, "folder_images": 1000}
"""Options that are counts, with their defaults."""
EXAMPLES = """\
examples:
  ekd-bench                                                    bundled digits, all parts, some minutes
  ekd-bench experiment=cifar10_limited data.fraction=1.0       full CIFAR-10, pretrained teachers
  ekd-bench --parts abc --rounds 5 --output bench.json data=cifar10

Overrides are those of ekd-train. Nothing else should run on the machine meanwhile.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-bench`."""
    what = "Measure a plain loop and this package in turn, on the same work.\n\nparts:\n"
    parser = make_parser(PROGRAM, what + "\n".join(f"  {key}  {text}" for key, text in PARTS.items()), EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for ekd-train")
    parser.add_argument("--parts", help=f"letters of the parts (default: all; on a GPU {GPU_PARTS})")
    parser.add_argument("--minutes", type=float, help="start no part after this time (default: no limit; on a GPU 3)")
    parser.add_argument("--rounds", type=int, help="counted rounds of every comparison")
    parser.add_argument("--plain-steps", type=int, help="steps of the plain loop in a round")
    parser.add_argument("--epochs", type=int, help="epochs of every training")
    parser.add_argument("--sweep-fraction", type=float, help="share of the data for parts d, g and i")
    parser.add_argument("--sweep-epochs", type=int, help="epochs of every training of parts d and i")
    parser.add_argument("--folder-images", type=int, help="images of the folder of part l")
    parser.set_defaults(**_COUNTS)
    parser.add_argument("--output", type=Path, help="JSON file for all numbers; a page (.md) goes beside it")
    run_command(parser, bench, argv, level=logging.WARNING)


def bench(args: argparse.Namespace) -> None:
    """Runs the parts, prints each as it is finished, and writes the JSON file and its page anew after each.

    Raises:
        UserError: For a user's mistake.
    """
    unknown = [letter for letter in args.parts or "" if letter not in PARTS]
    if unknown or args.parts == "":
        raise UserError(f"--parts {args.parts!r}: must be letters of {', '.join(PARTS)}, e.g. --parts abc")
    check_options(args, **dict.fromkeys(_COUNTS, COUNT), minutes=POSITIVE, sweep_fraction=SHARE)
    if args.output and args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder; give the name of a file")
    if args.output and args.output.suffix == ".md":
        raise UserError(f"--output {args.output}: is the page's name; name the JSON file, e.g. {args.output.stem}.json")
    if args.output:
        check_directory(args.output.parent)
    check_typed(args.overrides)
    with session("data", keep=False):
        left_out = _measure(args)
    words = " ".join(map(shell_word, args.overrides))
    rest = [f"ekd-bench --parts {left_out}{_again(args)} {words}"] if left_out else []
    print_next(*(command.rstrip() for command in (*rest, f"ekd-train {words}")))


def _again(args: argparse.Namespace) -> str:
    """The options of a command that measures the remaining parts as this one would have, into a file of its own."""
    given = {name: getattr(args, name) for name, usual in _COUNTS.items() if getattr(args, name) != usual}
    given |= {"sweep_fraction": args.sweep_fraction} if args.sweep_fraction else {}
    given |= {"output": args.output.with_stem(f"{args.output.stem}_rest")} if args.output else {}
    return "".join(f" --{name.replace('_', '-')} {shell_word(str(value))}" for name, value in given.items())


def _measure(args: argparse.Namespace) -> str:
    """Measures the chosen parts; returns the letters of those for which no time was left."""
    with phase("data"), importing("PyTorch and Lightning"):
        from ekd_lightning.bench.measurements import make_bench, measure  # noqa: PLC0415 (slow; --help needs none)
        from ekd_lightning.bench.page import HEADS, page, rows  # noqa: PLC0415
        from ekd_lightning.runs.writer import provenance  # noqa: PLC0415

    names = ("rounds", "plain_steps", "sweep_fraction", "sweep_epochs", "folder_images")
    counts = {name: getattr(args, name) for name in names}
    with phase("data"), part("data and teachers"):
        context = make_bench(args.overrides, epochs=args.epochs, minutes=args.minutes, **counts)
    on_gpu = context.device.type == "cuda"
    found: dict[str, Any] = {
        "origin": provenance(),
        "settings": " ".join(context.overrides),
        "rounds": args.rounds,
        "seconds": {"start": time.perf_counter() - context.began},
    }
    chosen, left_out = args.parts or (GPU_PARTS if on_gpu else "".join(PARTS)), ""
    for key in (key for key in PARTS if key in chosen):
        if not context.has_time():
            print(f"({key}) {PARTS[key]}: not started, the time limit (--minutes) is over", file=sys.stderr, flush=True)
            left_out += key
            continue
        print(f"({key}) {PARTS[key]}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        with phase(f"({key})"):
            found[key] = measure(key, context, found)
        found["seconds"][key] = time.perf_counter() - start
        print_table(f"({key}) {PARTS[key]}", HEADS, rows("", found[key]), left=HEADS[:1])
        print(f"({key}) took {found['seconds'][key]:.0f} s", file=sys.stderr, flush=True)
        if args.output:
            write_json(args.output, found)
            write_text(args.output.with_suffix(".md"), page(found, PARTS, args.output.name))
    return left_out


if __name__ == "__main__":
    main()
