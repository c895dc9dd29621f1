"""Panels of an evaluation, made of result.json and arrays.npz, for any dashboard.

Names are `<section>/<panel>`, as dashboards group panels by the part before the slash. Shape letters: N test images,
C classes, K branches, M teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ekd_lightning.roles import is_finite

MOST_EXAMPLES = 32

_DIVERSITY = ("pairwise_", "q_statistic", "double_fault", "error_correlation", "branch_variance", "mutual_information")
_SECTIONS = (
    ("corruptions", ("corruption_",)),
    ("flatness", ("sharpness", "loss_rise_")),
    ("generalisation", ("gap_", "train_accuracy", "train_nll")),
    ("efficiency", ("latency_", "throughput_", "memory_", "deployed_")),
    ("calibration", ("calibration_", "test_nll", "test_ece", "test_adaptive_ece", "test_brier", "test_overconfidence")),
    ("diversity", tuple(f"test_{name}" for name in _DIVERSITY)),
    ("fidelity", ("test_teacher_", "test_own_teacher_")),
    ("evaluation", ("test_",)),
    ("validation", ("val_",)),
)
"""Section of a field by its prefix; the first match counts. Other fields are not shown."""
TEST, TEST_BEST, TEST_EMA = "test", "test_best", "test_ema"
"""Sections of the scores of a run's own test, with the last weights, the best weights, and their moving average."""
_SCORES = ("accuracy", "top5", "nll", "ece", "brier", "branch_accuracy", "disagreement", "ambiguity")


class Table(NamedTuple):
    """Rows of numbers and strings under named columns."""

    columns: list[str]
    rows: list[list[Any]]


class Lines(NamedTuple):
    """Lines over a common axis: name to x and y values, of equal length for each line."""

    x_name: str
    y_name: str
    lines: dict[str, tuple[list[float], list[float]]]


class Example(NamedTuple):
    """A test image that the ensemble output gets wrong.

    Attributes:
        place: Position in the test set, from 0.
        image: uint8 [H, W, 3].
        true: Name of the true class.
        predicted: Name of the predicted class.
        confidence: Probability of the predicted class, in [0, 1].
    """

    place: int
    image: NDArray[np.uint8]
    true: str
    predicted: str
    confidence: float

    @property
    def caption(self) -> str:
        """True and predicted class in words."""
        return f"{self.true}, predicted as {self.predicted} ({100 * self.confidence:.0f} %)"


@dataclass(frozen=True)
class Panels:
    """All panels of an evaluation.

    Attributes:
        scalars: Numbers by `<section>/<field>`.
        tables: Tables by `<section>/<name>`.
        curves: Lines by `<section>/<name>`.
        confusion: int [C, C], rows are true classes; None if unknown.
        examples: Misclassified images.
        class_names: C names.
    """

    scalars: dict[str, float]
    tables: dict[str, Table]
    curves: dict[str, Lines]
    confusion: NDArray[Any] | None
    examples: list[Example]
    class_names: tuple[str, ...]


def make_panels(
    result: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], images: NDArray[np.uint8], names: tuple[str, ...]
) -> Panels:
    """Makes all panels of result.json, arrays.npz, test images (uint8 [N, 3, H, W]) and C class names."""
    return Panels(
        scalars(result),
        tables(result),
        curves(result, arrays),
        arrays.get("confusion"),
        misclassified(arrays, images, names),
        names,
    )


def scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns every finite number of a result, by `<section>/<field>`; branches one by one, counted from 0.

    Scores of the run's own test have the names under which training logs them: `test/accuracy` for the weights of
    the last epoch, `test_best/accuracy` for the best weights, `test_ema/accuracy` for the moving average. All other
    numbers are of the last epoch's weights.
    """
    found: dict[str, float] = {}
    for field, value in result.items():
        name = _scalar_name(field)
        if name is not None and is_finite(value):
            found[name] = float(value)
        elif name is not None and field.startswith("test_branch_accuracy") and isinstance(value, list):
            found |= {f"{name}_{k}": float(item) for k, item in enumerate(value)}
    return found


def _scalar_name(field: str) -> str | None:
    endings = {"_best": TEST_BEST, "_ema": TEST_EMA}
    ending = next((ending for ending in endings if field.endswith(ending)), "")
    score = field.removeprefix("test_").removesuffix(ending)
    if field.startswith("test_") and score in _SCORES:
        return f"{endings.get(ending, TEST)}/{score}"
    section = next((section for section, starts in _SECTIONS if field.startswith(starts)), None)
    return None if section is None or field.endswith("_last") else f"{section}/{field}"


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Makes the tables: branches, operating points, early exits, and similarities of branches and teachers."""
    made = {"evaluation/branches": branch_table(result)}
    if subsets := result.get("test_subsets"):
        columns = ["branches", "accuracy", "nll", "macs", "num_parameters"]
        rows = [["+".join(map(str, s["branches"])), *(s.get(name) for name in columns[1:])] for s in subsets]
        made["evaluation/operating_points"] = Table(columns, rows)
    if exits := result.get("test_early_exit"):
        columns = list(exits[0])
        made["evaluation/early_exit"] = Table(columns, [[row.get(name) for name in columns] for row in exits])
    for section, names in (
        ("diversity", ("branch_agreement", "branch_cka")),
        ("fidelity", ("branch_teacher_cka", "branch_teacher_agreement", "branch_teacher_kl")),
    ):
        for name in names:
            if result.get(f"test_{name}"):
                made[f"{section}/{name}"] = _matrix_table(result, f"test_{name}")
    return made


def branch_table(result: Mapping[str, Any]) -> Table:
    """Makes the table of test and validation accuracies, in [0, 1], of each branch and the ensemble output."""
    pairs = zip_longest(*(result.get(f"{split}_branch_accuracy") or [] for split in ("test", "val")))
    rows: list[list[Any]] = [[str(k), *pair] for k, pair in enumerate(pairs)]
    rows.append(["ensemble", result.get("test_accuracy"), result.get("val_accuracy")])
    return Table(["branch", "test accuracy", "val accuracy"], rows)


def curves(result: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, Lines]:
    """Makes the lines: reliability before and after temperature scaling, accuracy against cost, corruptions, loss."""
    made: dict[str, Lines] = {}
    reliability = {
        name: _reliability(arrays, suffix)
        for name, suffix in (("as trained", ""), ("temperature scaled", "_calibrated"))
        if f"reliability_accuracy{suffix}" in arrays
    }
    if reliability:
        reliability["perfect"] = ([0.0, 1.0], [0.0, 1.0])
        made["calibration/reliability"] = Lines("confidence", "accuracy", reliability)
    prefixes = [s for s in result.get("test_subsets") or [] if s["branches"] == list(range(len(s["branches"])))]
    if len(prefixes) > 1:
        line = ([float(s["macs"]) for s in prefixes], [float(s["accuracy"]) for s in prefixes])
        made["evaluation/accuracy_against_macs"] = Lines("MACs of an image", "test accuracy", {"first branches": line})
    if by_severity := result.get("corruption_accuracy_by_severity"):
        line = ([float(severity) for severity in range(1, len(by_severity) + 1)], list(by_severity))
        made["corruptions/accuracy_by_severity"] = Lines(
            "severity of the corruption", "test accuracy", {"mean over corruptions": line}
        )
    if "loss_curve_loss" in arrays:
        alpha = [float(value) for value in arrays["loss_curve_alpha"]]
        lines = {f"direction {d}": (alpha, [float(v) for v in row]) for d, row in enumerate(arrays["loss_curve_loss"])}
        made["flatness/loss_curve"] = Lines("distance along the direction", "training loss", lines)
    return made


def misclassified(
    arrays: Mapping[str, NDArray[Any]], images: NDArray[np.uint8], class_names: Sequence[str], most: int = MOST_EXAMPLES
) -> list[Example]:
    """Returns the misclassified test images with the highest confidence, in falling order.

    Of equally confident images, the first in the test set comes first.

    Args:
        arrays: Arrays with `ensemble_probs` [N, C] and `labels` [N]; if they are missing, the list is empty.
        images: uint8 [N, 3, H, W].
        class_names: C names.
        most: Largest number of images.
    """
    if "ensemble_probs" not in arrays or "labels" not in arrays:
        return []
    probs, labels = arrays["ensemble_probs"].astype(np.float32), arrays["labels"].astype(np.int64)
    predicted, rows = probs.argmax(axis=1), np.arange(len(labels))
    # In half precision two probabilities may be equal; then the predicted class is unknown here.
    wrong = np.flatnonzero(probs[rows, predicted] > probs[rows, labels])
    order = wrong[np.argsort(-probs[wrong, predicted[wrong]], kind="stable")][:most]
    return [
        Example(
            int(i),
            np.ascontiguousarray(images[i].transpose(1, 2, 0)),
            class_names[labels[i]],
            class_names[predicted[i]],
            float(probs[i, predicted[i]]),
        )
        for i in order
    ]


def _reliability(arrays: Mapping[str, NDArray[Any]], suffix: str) -> tuple[list[float], list[float]]:
    filled = arrays[f"reliability_count{suffix}"] > 0
    confidence, accuracy = arrays[f"reliability_confidence{suffix}"], arrays[f"reliability_accuracy{suffix}"]
    return [float(v) for v in confidence[filled]], [float(v) for v in accuracy[filled]]


def _matrix_table(result: Mapping[str, Any], name: str) -> Table:
    """Makes a table of a matrix, a row per cell: branch, other branch or teacher, and value."""
    across = "teacher" if "teacher" in name else "branch"
    ids = [teacher["id"] for teacher in result.get("teachers") or []] if across == "teacher" else []
    rows = [
        [f"branch {k}", ids[j] if j < len(ids) else f"{across} {j}", value]
        for k, row in enumerate(result[name])
        for j, value in enumerate(row)
    ]
    return Table(["branch", "teacher" if across == "teacher" else "other", "value"], rows)
