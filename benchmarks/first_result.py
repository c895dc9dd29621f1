"""EKD and its controls on 10 % of CIFAR-10, over seeds: makes docs/results/cifar10_10pct.md.

    python benchmarks/first_result.py --runs runs/first_result --data data --weights weights --jobs 2

5,000 labelled images (500 of them held out for validation), three pretrained teachers (ResNet-20, -32, -56,
trained on all 50,000 images by their authors), ResNet-8 students, and a plain ResNet-14 that costs what the
branched ResNet-8 costs. Weights of the losses are the defaults of the method files of then; nothing was tuned, and
the test set is read once per run, after training. Finished runs are skipped and stopped ones resumed, so the script
can be stopped and started again. It prints whatever comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ekd_lightning.reporting.tables import (
    half_width,
    methods_table,
    paired_difference,
    percent,
    short_table,
    summarise,
)

# EKD first: it fills the tables of teacher outputs (logits and features) that the others of its seed then read.
# The weight of the feature term is the default of the time when the page was made; it is nearly without effect.
FEATURES = "method.terms.feature_branch.weight=1"
RUNS = {
    "ekd": ["method=ekd", FEATURES],
    "ce": ["method=ce"],
    "branched_ce": ["method=branched_ce"],
    "kd_mean": ["method=kd_mean"],
    "ekd_mean": ["method=ekd_mean", FEATURES],
    "ekd_permuted": ["method=ekd_permuted", FEATURES],
    "kd_mean_resnet14": ["method=kd_mean", "student.network=resnet14"],
}
SHOWN = ("ce", "kd_mean", "kd_mean_resnet14", "branched_ce", "ekd_mean", "ekd_permuted", "ekd")
FIELDS = (
    "method",
    "student",
    "num_teachers",
    "num_branches",
    "split_after",
    "fraction",
    "num_train_images",
    "subset_sha256",
    "seed",
    "epochs",
    "batch_size",
    "steps",
    "precision",
    "num_parameters",
    "macs",
    "test_accuracy",
    "test_accuracy_best",
    "best_epoch",
    "test_branch_accuracy",
    "test_nll",
    "test_ece",
    "test_brier",
    "test_disagreement",
    "test_ambiguity",
    "val_accuracy",
    "train_seconds",
    "teacher_table_hit_rate",
)
RECIPE = ("recipe.epochs=30", "recipe.batch_size=64", "recipe.lr=0.05")


def train(name: str, seed: int, args: argparse.Namespace) -> int:
    """Runs one job in a process of its own, unless its result is there already."""
    directory = args.runs / f"{name}-s{seed}"
    if read_done(directory) is not None:
        return 0
    command = [sys.executable, "-m", "ekd_lightning.cli.train"]
    if (directory / "checkpoints" / "last.ckpt").is_file():
        command += [f"resume={directory}"]
    else:
        command += ["experiment=cifar10_limited", *RUNS[name], f"seed={seed}", *RECIPE]
        command += [f"data.root={args.data}", f"teachers.weights_dir={args.weights}"]
        command += [f"teachers.store={args.runs / 'store'}", f"hydra.run.dir={directory}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, check=False)
    print(f"{name} seed {seed}: {'done' if done.returncode == 0 else 'FAILED'}", flush=True)
    return done.returncode


def read_done(directory: Path) -> dict[str, Any] | None:
    """The result of a run that is done."""
    status = directory / "status.json"
    if not status.is_file() or json.loads(status.read_text())["state"] != "done":
        return None
    return dict(json.loads((directory / "result.json").read_text()))


def collect(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of all runs that are done, each under the name of its row."""
    found = [(name, read_done(args.runs / f"{name}-s{seed}")) for name in RUNS for seed in args.seeds]
    return [{**result, "method": name} for name, result in found if result is not None]


def differences(results: list[dict[str, Any]]) -> str:
    """EKD against every control, paired by seed, with Student's t interval."""
    lines = ["| difference | points, paired by seed | 95 % interval | n |", "|---|---|---|---|"]
    for control in SHOWN[:-1]:
        difference = paired_difference(results, "ekd", control)
        if difference is not None:
            half = half_width(difference)
            shown = "–"
            if half is not None:
                low, high = 100 * (difference.mean - half), 100 * (difference.mean + half)
                shown = f"{low:+.2f} to {high:+.2f}"
            cell = percent(difference, signed=True)
            lines.append(f"| `ekd` − `{control}` | {cell} | {shown} | {difference.n} |")
    return "\n".join(lines)


def verdict(results: list[dict[str, Any]], control: str) -> str:
    """What the runs say of EKD against one control, in words."""
    difference = paired_difference(results, "ekd", control)
    half = half_width(difference) if difference is not None else None
    if difference is None or half is None:
        return f"not enough runs to compare it with `{control}`"
    points = f"{100 * abs(difference.mean):.2f} points"
    if abs(difference.mean) <= half:
        return f"not clearly different from `{control}` ({100 * difference.mean:+.2f} points, within the interval)"
    return f"**{points} {'above' if difference.mean > 0 else 'below'}** `{control}`"


def verdicts(results: list[dict[str, Any]]) -> str:
    """One sentence over all controls."""
    text = "EKD is " + "; ".join(verdict(results, control) for control in SHOWN[:-1]) + "."
    return textwrap.fill(text, 115)


def origins(results: list[dict[str, Any]]) -> str:
    """Where the difference to the plain distilled student comes from: the branches, and their coupling."""
    lines = [
        "| method | mean branch − plain `kd_mean` | ensemble − mean branch | sum | n |",
        "|---|---|---|---|---|",
    ]
    for method in ("branched_ce", "ekd_mean", "ekd_permuted", "ekd"):
        branches = [
            {**r, "mean_branch": statistics.fmean(r["test_branch_accuracy"])}
            for r in results
            if r["method"] in (method, "kd_mean")
        ]
        parts = [
            {**r, "method": name, "value": r[field]}
            for r in branches
            for name, field in (("branch", "mean_branch"), ("whole", "test_accuracy"))
            if r["method"] == method
        ]
        plain = [{**r, "value": r["test_accuracy"]} for r in branches if r["method"] == "kd_mean"]
        rows = [*parts, *plain]
        cells = [
            paired_difference(rows, *pair, "value")
            for pair in (("branch", "kd_mean"), ("whole", "branch"), ("whole", "kd_mean"))
        ]
        n = cells[0].n if cells[0] else 0
        shown = " | ".join(percent(cell, signed=True) for cell in cells)
        lines.append(f"| `{method}` | {shown} | {n} |")
    return "\n".join(lines)


def report(results: list[dict[str, Any]], origin: dict[str, Any], args: argparse.Namespace) -> str:
    """The page: what was run, on what, and the tables."""
    first, hardware, packages = results[0], origin["hardware"], origin["packages"]
    teachers = next(r["teachers"] for r in results if r["teachers"])
    shown = "\n".join(
        f"| `{t['id']}` | {100 * t['test_accuracy']:.2f} | `{t['sha256'][:12]}` |" for t in teachers
    )
    return f"""# EKD and its controls on 10 % of CIFAR-10

Made by `benchmarks/first_result.py`; the numbers are those of the runs' `result.json` files, also in
[`cifar10_10pct.json`](cifar10_10pct.json). Nothing here is a number of the paper, and none can be compared with it.

- **Data**: CIFAR-10, {first["num_train_images"]:,} training and {first["num_val_images"]} validation images
  (subset `{first["subset_sha256"][:12]}`, the same for all runs), all 10,000 test images, read once per run.
- **Student**: ResNet-8 (option B); branched students share the stem and stage 1 and have 3 branches.
  `kd_mean_resnet14` is a plain ResNet-14, which costs about what the branched ResNet-8 costs.
- **Teachers**: pretrained on all 50,000 images, so also on those that the students must not see.
- **Recipe**: {first["epochs"]} epochs of SGD with Nesterov momentum, batch {first["batch_size"]}, cosine from 0.05,
  weight decay 5e-4, crop and flip; {first["steps"]:,} steps for every run. Short, because it ran on a processor:
  all students would gain from more epochs, and the order of the methods may change with them.
- **Losses**: the defaults of `conf/method/`, not tuned; EKD with a feature weight of 1, the default of then.
- **Seeds**: {", ".join(str(s) for s in sorted({r["seed"] for r in results}))}; the subset does not vary with the seed.
- **Hardware**: {hardware["cpu"]} ({hardware["cpu_capability"]}), {args.jobs} runs at a time with
  {args.threads} thread each, {first["precision"]}; torch {packages["torch"]}, Lightning
  {packages["pytorch-lightning"]}.

| teacher | test accuracy % | SHA-256 |
|---|---|---|
{shown}

Accuracies in percent, mean ± sample standard deviation over n seeds. K branches, M teachers.

{methods_table(results, SHOWN, "kd_mean")}

{differences(results)}

{verdicts(results)}

Where the difference to the plain distilled student comes from: what a branch alone is worth, and what coupling the
branches adds.

{origins(results)}

How to read it: three seeds tell large differences from chance, not small ones. `ekd_permuted` is EKD with its
teachers shifted by one branch; as all branches start alike, its distance from `ekd` is chance, and any difference
of that size between other rows may be chance too. The intervals take the runs' differences to be normal; they do not
know of other subsets, schedules or tunings.
"""


def readme_section(results: list[dict[str, Any]], origin: dict[str, Any]) -> str:
    """The short version for the README."""
    first, seeds = results[0], sorted({r["seed"] for r in results})
    return f"""## A first result

10 % of CIFAR-10 ({first["num_train_images"]:,} training images), teachers ResNet-20, -32, -56 (pretrained on all
images), ResNet-8 students and a plain ResNet-14 of the branched student's cost, {first["epochs"]} epochs, untuned
default weights, seeds {", ".join(map(str, seeds))}, on a processor ({origin["hardware"]["cpu"]},
{origin["hardware"]["cpu_capability"]}). Details, and what the numbers do and do not say:
[docs/results/cifar10_10pct.md](docs/results/cifar10_10pct.md).

{short_table(results, SHOWN)}

{verdicts(results)}

"""


def write(args: argparse.Namespace) -> None:
    """Writes the page, its data, and the README's section between its markers."""
    results = collect(args)
    origin = json.loads(next(args.runs.glob("*/provenance.json")).read_text())
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "cifar10_10pct.md").write_text(report(results, origin, args))
    rows = [{field: result.get(field) for field in FIELDS} for result in results]
    (args.output / "cifar10_10pct.json").write_text(json.dumps(rows, indent=1) + "\n")
    start, end = "<!-- first-result -->", "<!-- /first-result -->"
    before, rest = args.readme.read_text().split(start)
    args.readme.write_text(f"{before}{start}\n{readme_section(results, origin)}{end}{rest.split(end)[1]}")
    for name in SHOWN:
        values = [r["test_accuracy"] for r in results if r["method"] == name]
        print(f"{name:18} {percent(summarise(values) if values else None)}  n={len(values)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/first_result"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--weights", type=Path, default=Path("weights"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    failures = 0
    if not args.report_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(train, name, seed, args) for seed in args.seeds for name in RUNS]
            failures = sum(job.result() != 0 for job in jobs)
    write(args)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
