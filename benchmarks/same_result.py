"""Do the optimisations change the result? Final accuracies over seeds, with one optimisation at a time.

    python benchmarks/same_result.py --runs runs/same_result --output docs/results
    python benchmarks/same_result.py --gpu --jobs 8                      on a GPU: same_result_gpu.{md,json}

Part of the bundled digits, three small teachers, five seeds. Each row adds one optimisation to the plain form: live
float32 teachers, nothing folded or compiled, NCHW, float32 student.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from ekd_lightning.cli.train import quiet_libraries
from ekd_lightning.config.config import compose_settings
from ekd_lightning.pipeline.run import run
from ekd_lightning.runs.writer import provenance

PLAIN = (
    "method=ekd_pooled",
    "experiment=quick",
    "data.fraction=0.3",
    "trainer.precision=32-true",
    "teachers.table=off",
    "teachers.precision=float32",
    "teachers.fold=false",
    "teachers.compile=never",
    "channels_last=false",
    "student.compile=never",
    "capture=never",
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
GRAPH = "step as one CUDA graph"


def rows(*, gpu: bool) -> dict[str, tuple[str, ...]]:
    """Rows and their overrides; on a GPU the recorded step is one more, and part of all of them."""
    if not gpu:
        return ROWS
    last = {"all of them": (*ROWS["all of them"], "capture=auto")}
    return {name: (*words, "trainer=gpu") for name, words in {**ROWS, GRAPH: ("capture=auto",), **last}.items()}


def accuracy(job: tuple[str, int], *, gpu: bool, runs: Path) -> float:
    """Test accuracy of the run of a row and seed, in [0, 1]; read from its record when it is done already."""
    name, seed = job
    directory = runs / ("gpu" if gpu else "cpu") / f"{name.replace(' ', '_')}-s{seed}"
    done = directory / "result.json"
    if not done.is_file():
        quiet_libraries()
        words = (*PLAIN, *rows(gpu=gpu)[name], f"seed={seed}", f"teachers.store={runs / 'store'}")
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
    processor = f"{hardware['cpu']} ({hardware['cpu_capability']})"
    place = ", ".join(hardware["gpus"]) if GRAPH in found else processor
    return f"""# Do the optimisations change the result?

Made by `benchmarks/same_result.py`: `experiment=quick` on 30 % of the bundled digits, seeds
{", ".join(map(str, seeds))}, {place}, torch {origin["packages"]["torch"]}.
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
    parser.add_argument("--gpu", action="store_true", help="train on the GPU")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING)
    jobs = [(name, seed) for name in rows(gpu=args.gpu) for seed in args.seeds]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        every = pool.map(partial(accuracy, gpu=args.gpu, runs=args.runs), jobs, chunksize=1)
    found: dict[str, list[float]] = {}
    for (name, _), value in zip(jobs, every, strict=True):
        found.setdefault(name, []).append(value)
    args.output.mkdir(parents=True, exist_ok=True)
    page_name = "same_result_gpu" if args.gpu else "same_result"
    (args.output / f"{page_name}.md").write_text(page(found, provenance(), args.seeds))
    (args.output / f"{page_name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
