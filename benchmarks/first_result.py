"""EKD and its controls on 10 % of CIFAR-10, over seeds: makes docs/results/cifar10_10pct.md.

    python benchmarks/first_result.py --runs runs/first_result --data data --weights weights --jobs 2

5,000 labelled images (500 of them held out for validation), three pretrained teachers (ResNet-20, -32, -56,
trained on all 50,000 images by their authors), ResNet-8 students. Weights of the losses are the defaults of the
method files; nothing was tuned, and the test set is read once per run, after training. Finished runs are skipped,
so the script can be stopped and started again. It prints whatever comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ekd_lightning.reporting.tables import methods_table, percent, read_results, summarise

# EKD first: it fills the tables of teacher outputs (logits and features) that the others of its seed then read.
METHODS = ("ekd", "ce", "branched_ce", "kd_mean", "ekd_mean", "ekd_permuted")
SHOWN = ("ce", "kd_mean", "branched_ce", "ekd_mean", "ekd_permuted", "ekd")
RECIPE = ("recipe.epochs=15", "recipe.batch_size=32", "recipe.lr=0.05")


def train(method: str, seed: int, args: argparse.Namespace) -> int:
    """Runs one job in a process of its own, unless its result is there already."""
    directory = args.runs / f"{method}-s{seed}"
    status = directory / "status.json"
    if status.is_file() and json.loads(status.read_text())["state"] == "done":
        return 0
    command = [sys.executable, "-m", "ekd_lightning.cli.train"]
    if (directory / "checkpoints" / "last.ckpt").is_file():
        command += [f"resume={directory}"]
    else:
        command += ["experiment=cifar10_limited", f"method={method}", f"seed={seed}", *RECIPE]
        command += [f"data.root={args.data}", f"teachers.weights_dir={args.weights}"]
        command += [f"teachers.store={args.runs / 'store'}", f"hydra.run.dir={directory}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, check=False)
    print(f"{method} seed {seed}: {'done' if done.returncode == 0 else 'FAILED'}", flush=True)
    return done.returncode


def report(args: argparse.Namespace) -> str:
    """The page: what was run, on what, and the table."""
    results = read_results(args.runs)
    first = results[0]
    origin = json.loads(next(args.runs.glob("*/provenance.json")).read_text())
    hardware, packages = origin["hardware"], origin["packages"]
    teachers = next(r["teachers"] for r in results if r["teachers"])
    shown = "\n".join(
        f"| `{t['id']}` | {100 * t['test_accuracy']:.2f} | `{t['sha256'][:12]}` |" for t in teachers
    )
    found = [m for m in SHOWN if any(r["method"] == m for r in results)]
    seconds = {m: summarise(r["train_seconds"] for r in results if r["method"] == m) for m in found}
    cost = ", ".join(f"`{m}` {cell.mean:.0f} s" for m, cell in seconds.items())
    return f"""# EKD and its controls on 10 % of CIFAR-10

Made by `benchmarks/first_result.py`; the numbers are those of the runs' `result.json` files, also in
[`cifar10_10pct.json`](cifar10_10pct.json). Nothing here is a number of the paper, and none can be compared with it.

- **Data**: CIFAR-10, {first["num_train_images"]:,} training and {first["num_val_images"]} validation images
  (subset `{first["subset_sha256"][:12]}`, the same for all runs), all 10,000 test images, read once per run.
- **Student**: ResNet-8 (option B); branched students share the stem and stage 1 and have 3 branches.
- **Recipe**: {first["epochs"]} epochs of SGD with Nesterov momentum, batch {first["batch_size"]}, cosine from 0.05,
  weight decay 5e-4, crop and flip; {first["steps"]:,} steps for every run. Short, because it ran on a processor.
- **Losses**: the defaults of `conf/method/`, not tuned.
- **Seeds**: {", ".join(str(s) for s in sorted({r["seed"] for r in results}))}; the subset does not vary with the seed.
- **Hardware**: {hardware["cpu"]} ({hardware["cpu_capability"]}), {args.jobs} runs at a time with
  {args.threads} thread each, {first["precision"]}; torch {packages["torch"]}, Lightning
  {packages["pytorch-lightning"]}.

| teacher | test accuracy % | SHA-256 |
|---|---|---|
{shown}

Accuracies in percent, mean ± sample standard deviation over n seeds. K branches, M teachers.

{methods_table(results, SHOWN, "kd_mean")}

Training time per run (other runs beside it on the machine, teacher outputs shared through tables; an indication of
cost, not a measurement of speed): {cost}.
"""


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
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    failures = 0
    if not args.report_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(train, method, seed, args) for seed in args.seeds for method in METHODS]
            failures = sum(job.result() != 0 for job in jobs)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "cifar10_10pct.md").write_text(report(args))
    rows = read_results(args.runs)
    (args.output / "cifar10_10pct.json").write_text(json.dumps(rows, indent=1) + "\n")
    for method in SHOWN:
        values = [r["test_accuracy"] for r in rows if r["method"] == method]
        print(f"{method:14} {percent(summarise(values) if values else None)}  n={len(values)}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
