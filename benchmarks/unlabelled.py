"""What are images without labels worth? CIFAR-10 with 1, 5 and 10 % of the labels, the rest unlabelled, or left out.

    python benchmarks/unlabelled.py run OUT                          what is missing, one run after the other
    python benchmarks/unlabelled.py page OUT docs/results/unlabelled_cifar10.md

Both may be repeated at any time, and several may run side by side: finished runs are kept, a run that another process
is making is left to it, and what the page lacks it calls missing. All runs of a share
of the labels take the same number of steps with batches of the same size. Teachers are three published networks, which
have seen the labels of all images, or three that are trained on the subset alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekd_lightning.errors import UserError
from ekd_lightning.markdown import Markdown, code, table
from ekd_lightning.reporting.report import machine
from ekd_lightning.runs.directory import RunDirectory

LABELS = {0.01: (490, 210), 0.05: (78, 38), 0.1: (38, 19)}
"""Epochs without and with unlabelled images, by the share of the labels: 1470, 1482 and 1482 steps of 128 images."""
SEEDS = (0, 1, 2)
PUBLISHED, SUBSET = "published", "subset"
TEACHERS = {
    PUBLISHED: "three published networks, trained on all labels",
    SUBSET: "three networks, trained on the labelled images alone",
}
ROWS = (
    ("kd_mean", False),
    ("kd_mean", True),
    ("ce", False),
    ("pseudo_labels", True),
    ("ekd_pooled", False),
    ("ekd_pooled", True),
)
"""Methods, without and with unlabelled images."""
WORDS = (
    "data=cifar10",
    "data.val_fraction=0",
    "recipe=cifar10",
    "recipe.batch_size=128",
    "trainer=cpu",
    "trainer.threads=1",
    "trainer.precision=bf16-mixed",
    "trainer.enable_checkpointing=false",
    "teachers.compile=never",
    "student.compile=never",
    "evaluation=none",
)
ON_SUBSET = (
    "teachers=trained",
    "teachers.pool=[{train: resnet20, seed: 0}, {train: resnet20, seed: 1}, {train: resnet20, seed: 2}]",
    "teachers.count=3",
    "teachers.train_on=subset",
)


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    method: str
    unlabelled: bool
    teachers: str
    fraction: float
    seed: int

    def folder(self, out: Path) -> Path:
        """Its directory."""
        kind = "unlabelled" if self.unlabelled else "alone"
        return out / f"{self.teachers}-{self.method}-{kind}-{100 * self.fraction:g}-s{self.seed}"

    def words(self) -> list[str]:
        """What `ekd-train` is told."""
        epochs = LABELS[self.fraction][self.unlabelled]
        words = [*WORDS, f"method={self.method}", f"data.fraction={self.fraction}", f"seed={self.seed}"]
        words += [f"recipe.epochs={epochs}", *(["data.unlabelled=rest"] if self.unlabelled else [])]
        if self.teachers == SUBSET:
            return [*words, *ON_SUBSET, f"teachers.recipe.epochs={LABELS[self.fraction][0]}"]
        return [*words, "teachers=cifar10"]

    def result(self, out: Path) -> Mapping[str, Any] | None:
        """Its record; None where it is missing."""
        run = RunDirectory(self.folder(out))
        try:
            return {**run.finished_result(), "machine": machine(run.provenance())}
        except UserError:
            return None


def jobs() -> Iterator[Job]:
    """All runs, the most telling first: one seed after the other, published teachers before others."""
    for seed in SEEDS:
        for teachers in TEACHERS:
            for method in dict.fromkeys(method for method, _ in ROWS):
                for fraction in LABELS:
                    for name, unlabelled in ROWS:
                        if name == method and (teachers == PUBLISHED or method != "ce"):
                            yield Job(method, unlabelled, teachers, fraction, seed)


def run(out: Path) -> None:
    """Makes the runs that are missing."""
    train = str(Path(sys.executable).with_name("ekd-train"))
    opening = Job("ekd_pooled", False, PUBLISHED, 0.01, 0)
    # Tables with pooled features serve all methods, once they are there.
    subprocess.run(
        [train, *opening.words(), "trainer.max_steps=1", f"hydra.run.dir={out}/.opening", "overwrite=true"], check=False
    )
    for job in jobs():
        if job.result(out) is None:
            subprocess.run([train, *job.words(), f"hydra.run.dir={job.folder(out)}", "overwrite=true"], check=False)


Records = Mapping[Job, Mapping[str, Any]]


def page(found: Records) -> str:
    """The page, from the records alone."""
    parts = [TITLE, answer(found), INTRO, setup(found)]
    for teachers, called in TEACHERS.items():
        parts += [f"## Taught by {called}\n", taught(found, teachers), accuracies(found, teachers)]
    missing = [job for job in jobs() if job not in found]
    total = len(list(jobs()))
    done = f"{total - len(missing)} of {total} runs are done; rows say of how many seeds they are."
    machines = "; ".join(sorted({f"{result['machine']}, {result['precision']}" for result in found.values()}))
    parts.append(f"{done}{f' Made on: {machines}.' if machines else ''}\n")
    return "\n".join(part for part in parts if part)


TITLE = "# Images without labels: CIFAR-10\n"
INTRO = """Made by `benchmarks/unlabelled.py` from the records of the runs. A share of CIFAR-10's training images has
labels; the others are left out (labels alone), or are trained on without labels (`data.unlabelled=rest`), as half of
each batch. All runs of one share take the same number of steps with batches of the same size, so with unlabelled
images every labelled one is seen half as often. There are no validation images, and scores are those of the last
weights. A plain ResNet-8 is the student of `ce`, `kd_mean` and `pseudo_labels`; `ekd_pooled` has three branches.

Published teachers were trained on the labels of all 50,000 images, so they hand on labels that the student is not
given. That is why the same rows are shown with teachers that saw the labelled images only, and beside
`pseudo_labels`, a plain student trained on the class that the teachers' mean finds most likely.
"""


def answer(found: Records) -> str:
    """The gains, a line for each set of teachers and method; empty before there are any."""
    said = []
    for teachers, called in TEACHERS.items():
        for method in ("kd_mean", "ekd_pooled"):
            gains = {fraction: gained(found, method, teachers, fraction) for fraction in LABELS}
            means = [f"{cell(values, '+.2f')} at {100 * share:g} %" for share, values in gains.items() if values]
            said += [f"- {code(method)}, taught by {called}: {', '.join(means)}"] if means else []
    head = "Points of test accuracy that images without labels add, paired by seed (mean ± standard deviation):"
    return "\n".join([head, "", *said, ""]) if said else ""


def setup(found: Records) -> str:
    """What all runs share, as they recorded it."""
    if not found:
        return "No run is done yet.\n"
    lines = []
    for fraction in LABELS:
        own = [result for job, result in found.items() if job.fraction == fraction]
        seen = {(r["num_train_images"], r["num_unlabelled_images"], r["steps"], r["batch_size"]) for r in own}
        for labelled, unlabelled, steps, size in sorted(seen):
            lines.append((f"{100 * fraction:g} %", f"{labelled:,}", f"{unlabelled:,}", f"{steps:,}", size))
    cost = {job.method: f"{code(job.method)} {result['macs'] / 1e6:.1f} M" for job, result in found.items()}
    heads = ("labels", "labelled images", "unlabelled images", "steps", "batch")
    return Markdown(f"{table(heads, lines)}\nMACs of the students per image: {', '.join(cost.values())}.\n")


def taught(found: Records, teachers: str) -> str:
    """The teachers' own accuracies."""
    by_share = {}
    for fraction in LABELS:
        own = [
            r for job, r in found.items() if (job.teachers, job.fraction) == (teachers, fraction) and r.get("teachers")
        ]
        scores = {teacher["id"]: teacher["test_accuracy"] for result in own for teacher in result["teachers"]}
        by_share[fraction] = ", ".join(f"{name} {100 * score:.2f}" for name, score in scores.items()) or "missing"
    if len(set(by_share.values())) == 1:  # published ones are the same for all shares
        return f"Their test accuracy in %: {next(iter(by_share.values()))}.\n"
    lines = [f"{100 * fraction:g} %: {said}" for fraction, said in by_share.items()]
    return "Their test accuracy in %, by the share of the labels: " + "; ".join(lines) + ".\n"


def scores(found: Records, row: tuple[str, bool], teachers: str, fraction: float) -> dict[int, float]:
    """Test accuracy in % by seed; `ce` has no teachers and is shown beside all of them."""
    own = PUBLISHED if row[0] == "ce" else teachers
    kept = {seed: found.get(Job(*row, own, fraction, seed)) for seed in SEEDS}
    return {seed: 100 * result["test_accuracy"] for seed, result in kept.items() if result is not None}


def cell(values: list[float], form: str = ".2f") -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return "missing"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread} (n={len(values)})"


def accuracies(found: Records, teachers: str) -> str:
    """One line for each row."""
    lines = [
        [
            code(method),
            "half of each batch" if unlabelled else "none",
            *(cell([*scores(found, (method, unlabelled), teachers, fraction).values()]) for fraction in LABELS),
        ]
        for method, unlabelled in ROWS
    ]
    heads = ("method", "unlabelled images", *(f"{100 * fraction:g} % of the labels" for fraction in LABELS))
    return Markdown("Test accuracy in %, mean ± standard deviation over seeds:\n\n" + table(heads, lines))


def gained(found: Records, method: str, teachers: str, fraction: float) -> list[float]:
    """Points that unlabelled images add to a method, of each seed that has both runs."""
    without, beside = (scores(found, (method, kind), teachers, fraction) for kind in (False, True))
    return [beside[seed] - without[seed] for seed in beside if seed in without]


def kept(found: Records) -> list[dict[str, Any]]:
    """The records as they are kept beside the page."""
    names = ("test_accuracy", "test_nll", "num_train_images", "num_unlabelled_images", "steps", "subset_sha256")
    names += ("unlabelled_sha256", "macs", "precision", "machine", "train_seconds")
    return [{**vars(job), **{name: result.get(name) for name in names}} for job, result in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("out", type=Path, help="the folder of the runs")
    parser.add_argument("page", type=Path, nargs="?", help="the page; its records go beside it as .json")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.what == "run":
        run(out)
        return
    if args.page is None:
        parser.error("page: where?")
    found = {job: result for job in jobs() if (result := job.result(out)) is not None}
    args.page.write_text(page(found))
    args.page.with_suffix(".json").write_text(json.dumps(kept(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
