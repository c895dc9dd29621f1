"""Made-up runs with everything that a run can have on record: evaluation, arrays, curves, provenance, failures."""

from __future__ import annotations

import csv
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from made_runs import result, write_run

EVIL = '</script><script>window.hurt=1</script><img src=x onerror=window.hurt=1> & "quotes" \' $$ {{answer}}'
"""An error message that must be seen as what it is, and do nothing."""
EVIL_NAME = (
    "a\n\n# heading\n\n</script><script>window.hurt=1</script><img src=x onerror=window.hurt=1> | x | `y` "
    "[z](javascript:hurt()) ![w](http://a.b/c.png) {{ 7*7 }} \\<b> &lt;i> <a href='javascript:hurt()'>q</a>"
)
"""A name that would be markup in Markdown, HTML, templates and the labels of plotly."""
_NO_NAMES = {"sha256", "subset_sha256", "views", "ensemble", "assignment", "weights", "split_after"}
METHODS = {"ce": 0.62, "kd_mean": 0.70, "branched_ce": 0.64, "ekd_mean": 0.725, "ekd": 0.74}
SEEDS = (0, 1, 2)
FRACTIONS = (0.05, 0.1)
BINS = 15


def rich_result(method: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    """A result.json with the fields of all parts of the evaluation."""
    made = result(method, seed, accuracy, **more)
    rng = np.random.default_rng(1000 * seed + len(method))
    K, M = made["num_branches"], made["num_teachers"]
    single = [round(accuracy - 0.02 + 0.01 * float(rng.random()), 4) for _ in range(K)]
    made |= {
        "test_branch_accuracy": single,
        "test_mean_branch_accuracy": float(np.mean(single)),
        "test_best_branch_accuracy": max(single),
        "test_gain_over_mean_branch": accuracy - float(np.mean(single)),
        "test_oracle_accuracy": min(1.0, accuracy + 0.08),
        "test_subsets": _subsets(made, single),
        "test_ece_calibrated": 0.02 + 0.004 * float(rng.random()),
        "test_nll_calibrated": 0.8 * (1 - accuracy),
        "calibration_temperature": 1.7,
        "test_js": 0.1,
        "corruption_source": "regenerated",
        "corruption_clean_accuracy": accuracy + 0.01,
        "corruption_clean_nll": 1 - accuracy,
        "corruption_clean_ece": 0.05,
        "corruption_mce": 1 - accuracy + 0.2,
        "corruption_accuracy_by_severity": [accuracy - 0.07 * s + 0.01 * float(rng.random()) for s in range(1, 6)],
        "corruption_nll_by_severity": [1 - accuracy + 0.2 * s for s in range(1, 6)],
        "corruption_ece_by_severity": [0.05 + 0.03 * s for s in range(1, 6)],
        "gap_accuracy": 0.2,
        "latency_ms_batch1": 1.25,
        "deployed_bytes": 900_000,
        "evaluated": ["predictions", "corruptions"],
    }
    if K > 1:
        made["test_early_exit"] = [
            {
                "threshold": t,
                "accuracy": accuracy - 0.02 + 0.02 * t,
                "mean_branches": 1 + (K - 1) * t,
                "macs": made["macs"] - 7_350_000 * (K - 1) * (1 - t),
            }
            for t in (0.5, 0.7, 0.9, 1.0)
        ]
        made["test_branch_cka"] = _matrix(rng, K, K, diagonal=1.0)
        if M:
            made["test_branch_teacher_cka"] = _matrix(rng, K, M, diagonal=0.9)
    return made


def _subsets(made: dict[str, Any], single: list[float]) -> list[dict[str, Any]]:
    K = made["num_branches"]
    return [
        {
            "branches": list(kept),
            "accuracy": max(single[k] for k in kept) + 0.008 * (size - 1),
            "nll": 1.0,
            "macs": made["macs"] - 7_350_000 * (K - size),
            "num_parameters": made["num_parameters"] - 72_906 * (K - size),
        }
        for size in range(1, K + 1)
        for kept in combinations(range(K), size)
    ]


def _matrix(rng: np.random.Generator, rows: int, columns: int, diagonal: float) -> list[list[float]]:
    made = 0.5 + 0.2 * rng.random((rows, columns))
    for k in range(min(rows, columns)):
        made[k, k] = diagonal
    return [[float(value) for value in row] for row in made]


def arrays(seed: int) -> dict[str, np.ndarray]:
    """What arrays.npz holds; the first bins are empty."""
    rng = np.random.default_rng(seed)
    confidence = (np.arange(BINS) + 0.5) / BINS
    count = np.where(np.arange(BINS) < 2, 0, rng.integers(20, 400, BINS))
    made = {}
    for suffix, shift in (("", 0.12), ("_calibrated", 0.01)):
        accuracy = np.clip(confidence - shift + 0.02 * rng.standard_normal(BINS), 0, 1)
        made |= {
            f"reliability_confidence{suffix}": np.where(count > 0, confidence, np.nan),
            f"reliability_accuracy{suffix}": np.where(count > 0, accuracy, np.nan),
            f"reliability_count{suffix}": count,
        }
    return made


def write_curves(directory: Path, accuracy: float, seed: int, epochs: int = 12) -> None:
    """metrics.csv as the trainer writes it, with the row of the test in the end."""
    rng = np.random.default_rng(seed)
    with (directory / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "val/accuracy", "val/nll", "epoch", "train/loss", "test/accuracy"])
        for epoch in range(epochs):
            reached = accuracy * (1 - 0.7 * 0.7**epoch) + 0.01 * float(rng.random())
            rows.writerow([70 * (epoch + 1) - 1, reached, 2 * (1 - reached), float(epoch), 3 * (1 - reached), ""])
        rows.writerow([70 * epochs, "", "", float(epochs), "", accuracy])


def write_rich(directory: Path, made: dict[str, Any], **more: Any) -> Path:
    """A run with all its files."""
    write_run(directory, made, **more)
    np.savez(directory / "arrays.npz", **arrays(made["seed"]))
    write_curves(directory, made["test_accuracy"], made["seed"])
    (directory / "provenance.json").write_text(json.dumps({"data": {"source": "/home/somebody/data/cifar"}}))
    return directory


def write_rich_study(folder: Path) -> Path:
    """Five methods, two fractions, three seeds; a grid of teachers and branches; one alone, and three that failed."""
    for fraction in FRACTIONS:
        for method, accuracy in METHODS.items():
            for seed in SEEDS:
                reached = accuracy + 0.6 * (fraction - 0.1) + 0.004 * ((seed * 7 + len(method)) % 5 - 2)
                made = rich_result(method, seed, round(reached, 4), fraction=fraction)
                write_rich(folder / f"{method}-f{fraction}-s{seed}", made)
    for K in (1, 2, 3):
        for M in (1, 2, 3):
            for seed in (0, 1) if (K, M) != (3, 3) else ():
                made = rich_result("ekd", seed, 0.68 + 0.012 * K + 0.008 * M + 0.003 * seed, K=K, M=M)
                write_rich(folder / f"grid-K{K}-M{M}-s{seed}", made)
    write_rich(folder / "alone", rich_result("crd", 0, 0.71, K=1))
    write_run(folder / "failed-evil", result("ekd", 7, 0.0), "failed", error=EVIL)
    write_run(
        folder / "failed-memory",
        result("kd_mean", 3, 0.0),
        "failed",
        error="OutOfMemoryError: no memory at /home/x/y.py",
    )
    write_run(folder / "failed-fsp", result("fsp", 0, 0.0), "failed", error="UserError: fsp needs stages of equal size")
    return folder


def evil(made: Any, key: str = "") -> Any:
    """A record in which every text is evil but for hashes and words of the format."""
    if isinstance(made, dict):
        return {name: evil(value, name) for name, value in made.items()}
    if isinstance(made, list):
        return [evil(value, key) for value in made]
    return f"{made} {EVIL_NAME}" if isinstance(made, str) and key not in _NO_NAMES else made


def write_hostile_study(folder: Path) -> Path:
    """Three methods and two seeds, with all files, and one that failed; every name is evil."""
    for seed in (0, 1):
        for method in ("ekd", "ce", "kd_mean"):
            made = rich_result(method, seed, 0.7 + seed / 100)
            write_rich(folder / f"{method}{seed}", {**evil(made), "data": f"d{EVIL_NAME}"})
        write_rich(folder / f"plain{seed}", {**rich_result("ekd", seed, 0.7), "data": f"d{EVIL_NAME}"})
    write_run(folder / "failed", evil(result("ekd", 9)), "failed", error=EVIL_NAME.replace("\n", " "))
    return folder
