"""Do the optimisations change the result? Final accuracies over seeds, with one optimisation at a time.

    python benchmarks/same_result.py --runs runs/same_result --output docs/results

Part of the bundled digits, three small teachers, five seeds. Each row adds one optimisation to the plain form: live
float32 teachers, nothing folded or compiled, NCHW, float32 student.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

from ekd_lightning.cli.train import quiet_libraries
from ekd_lightning.config.config import compose_settings
from ekd_lightning.pipeline.run import run
from ekd_lightning.runs.writer import provenance

PLAIN = (
    "experiment=quick",
    "data.fraction=0.3",
    "trainer.precision=32-true",
    "teachers.table=off",
    "teachers.precision=float32",
    "teachers.fold=false",
    "teachers.compile=never",
    "channels_last=false",
    "student.compile=never",
)
ROWS = {
    "plain": (),
    "teacher table": ("teachers.table=require",),
    "teachers folded": ("teachers.fold=true",),
    "teachers in bfloat16": ("teachers.precision=bfloat16",),
    "teachers compiled": ("teachers.compile=always",),
    "channels-last": ("channels_last=true",),
    "student in bfloat16": ("trainer.precision=bf16-mixed",),
    "student compiled": ("student.compile=always",),
    "all of them": (
        "teachers.table=require",
        "teachers.fold=true",
        "teachers.precision=bfloat16",
        "teachers.compile=always",
        "channels_last=true",
        "trainer.precision=bf16-mixed",
        "student.compile=always",
    ),
}


def accuracy(name: str, seed: int, args: argparse.Namespace) -> float:
    """Test accuracy of one run, in [0, 1]; read from its record when it is done already."""
    directory = args.runs / f"{name.replace(' ', '_')}-s{seed}"
    done = directory / "result.json"
    if not done.is_file():
        words = (*PLAIN, *ROWS[name], f"seed={seed}", f"teachers.store={args.runs / 'store'}")
        run(compose_settings(*words), directory)
    return float(json.loads(done.read_text())["test_accuracy"])


def table(found: dict[str, list[float]]) -> str:
    """Mean, spread, and the difference to the plain form, paired by seed."""
    lines = ["| form | accuracy % | minus plain, paired | n |", "|---|---|---|---|"]
    for name, values in found.items():
        percent = [100 * value for value in values]
        differences = [100 * (a - b) for a, b in zip(values, found["plain"], strict=True)]
        lines.append(
            f"| {name} | {statistics.mean(percent):.2f} ± {statistics.stdev(percent):.2f} "
            f"| {statistics.mean(differences):+.2f} ± {statistics.stdev(differences):.2f} | {len(values)} |"
        )
    return "\n".join(lines)


def page(found: dict[str, list[float]], origin: dict[str, Any], seeds: list[int]) -> str:
    """The page for docs/results."""
    hardware = origin["hardware"]
    return f"""# Do the optimisations change the result?

Made by `benchmarks/same_result.py`: `experiment=quick` on 30 % of the bundled digits, seeds
{", ".join(map(str, seeds))}, {hardware["cpu"]} ({hardware["cpu_capability"]}), torch {origin["packages"]["torch"]}.
Every row adds one optimisation to the plain form (live float32 teachers, nothing folded or compiled, NCHW, float32
student). Mean ± sample standard deviation over n seeds; the spread of the plain form shows the noise of the seed.
The losses of the first steps are compared in `tests/system/test_same_result.py`.

{table(found)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/same_result"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING)
    found = {name: [accuracy(name, seed, args) for seed in args.seeds] for name in ROWS}
    args.output.mkdir(parents=True, exist_ok=True)
    origin = provenance()
    (args.output / "same_result.md").write_text(page(found, origin, args.seeds))
    (args.output / "same_result.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
