"""Run directories with made-up results, as the record of a run would have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ekd_lightning.runs.collection import Collection, RunEntry
from ekd_lightning.runs.directory import RunState
from ekd_lightning.runs.result import Result

TEACHERS = [
    {"id": f"teacher{m}", "sha256": f"{m}" * 64, "test_accuracy": 0.9 + m / 100, "num_parameters": 270_000}
    for m in range(4)
]
MACS = {"resnet8": 12_500_000, "resnet14": 26_700_000, "resnet20": 41_000_000}
SIZE = {"resnet8": 78_042, "resnet14": 175_258, "resnet20": 272_474}
UNTAUGHT = ("ce", "branched_ce")
PLAIN = ("ce", "kd_mean")


def result(
    method: str = "ekd",
    seed: int = 0,
    accuracy: float = 0.7,
    *,
    K: int | None = None,
    M: int | None = None,
    student: str = "resnet8",
    data: str = "cifar10",
    fraction: float = 0.1,
    **more: Any,
) -> dict[str, Any]:
    """A result.json."""
    K = K or (1 if method in PLAIN else 3)
    M = 0 if method in UNTAUGHT else (3 if M is None else M)
    images = round(50_000 * fraction * 0.9)
    made = {
        "method": method,
        "data": data,
        "student": student,
        "num_teachers": M,
        "assistants": [],
        "num_branches": K,
        "split_after": "stage1" if K > 1 else None,
        "ensemble": "mean_logits",
        "temperature": 4.0,
        "assignment": "one_to_one" if M else None,
        "fraction": fraction,
        "num_train_images": images,
        "num_val_images": images // 9,
        "subset_sha256": f"{data}{fraction}".ljust(64, "0"),
        "seed": seed,
        "epochs": 2,
        "epochs_done": 2,
        "batch_size": 64,
        "steps": 2 * (images // 64),
        "views": "crop_flip-padding4-flip",
        "mixup": 0.0,
        "cutmix": 0.0,
        "precision": "32-true",
        "num_devices": 1,
        "num_parameters": SIZE[student] + 72_906 * (K - 1),
        "num_adapter_parameters": 0,
        "macs": MACS[student] + 7_350_000 * (K - 1),
        "tags": [],
        "partial": False,
        "weight_ce_ensemble": 0.1,
        "teacher_choice": None,
        "teacher": None,
        "pool_teachers": [teacher["id"] for teacher in TEACHERS[:M]],
        "teachers": TEACHERS[:M],
        "val_accuracy": accuracy + 0.01,
        "test_accuracy": accuracy,
        "test_nll": 1.0 - accuracy,
        "test_ece": 0.05,
        "test_brier": 0.4,
        "test_disagreement": 0.2,
        "test_branch_accuracy": [accuracy - 0.01 * (k + 1) for k in range(K)],
        "test_gain_over_mean_branch": 0.005 * (K + 1),
        "train_seconds": 100.0 + seed,
    }
    return {**made, **more}


def config(made: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The config.yaml that belongs to a result; `settings` are dotted keys with `__` for the dot."""
    content: dict[str, Any] = {
        "data": {"name": made["data"], "root": "data", "fraction": made["fraction"]},
        "teachers": {"pool": [teacher["id"] for teacher in TEACHERS], "count": made["num_teachers"] or 3},
        "student": {"network": made["student"], "branches": made["num_branches"], "options": {}},
        "method": {
            "name": made["method"],
            "temperature": made["temperature"],
            "terms": {"ce_ensemble": {"weight": made["weight_ce_ensemble"]}},
        },
        "recipe": {"epochs": made["epochs"], "batch_size": made["batch_size"], "lr": 0.1},
        "trainer": {"accelerator": "auto", "precision": "auto"},
        "seed": made["seed"],
    }
    for key, value in settings.items():
        part = content
        *parents, last = key.split("__")
        for name in parents:
            part = part[name]
        part[last] = value
    return content


def write_run(
    directory: Path,
    made: dict[str, Any],
    state: str = "done",
    *,
    error: str | None = None,
    time: str = "2026-01-01T00:00:00+00:00",
    **settings: Any,
) -> Path:
    """Writes a run directory; one that is not done has no result."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config(made, **settings)))
    (directory / "status.json").write_text(json.dumps({"state": state, "error": error, "time": time}))
    if state == "done":
        (directory / "result.json").write_text(json.dumps(made))
    return directory


ACCURACIES = {
    "ce": (0.60, 0.61, 0.62),
    "kd_mean": (0.70, 0.71, 0.73),
    "ekd": (0.72, 0.73, 0.76),
    "ekd_mean": (0.72, 0.74, 0.75),
    "branched_ce": (0.62, 0.61, 0.63),
}


def write_study(folder: Path, accuracies: Mapping[str, tuple[float, ...]] = ACCURACIES, **more: Any) -> Path:
    """One run per method and seed, in `<method>-s<seed>`."""
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            write_run(folder / f"{method}-s{seed}", result(method, seed, accuracy, **more))
    return folder


def entry(
    made: dict[str, Any], name: str | None = None, state: str = "done", time: str | None = None, **settings: Any
) -> RunEntry:
    """A run in memory, with the configuration that belongs to it."""
    name = name or f"{made['method']}-s{made['seed']}"
    error = "broke" if state == "failed" else None
    kept = Result.of(made) if state in ("done", "partial") else None
    run = RunEntry(Path("/nowhere") / name, name, RunState(state), kept, error, time)
    vars(run)["config"] = config(made, **settings)  # in place of what the file would hold
    return run


def collection(*runs: RunEntry) -> Collection:
    return Collection(Path("/nowhere"), tuple(runs))


def study(accuracies: Mapping[str, tuple[float, ...]] = ACCURACIES, **more: Any) -> list[RunEntry]:
    """One run per method and seed, in memory."""
    return [
        entry(result(method, seed, value, **more), f"{method}-{more}-s{seed}")
        for method, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
