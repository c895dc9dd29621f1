"""Sections of a model card that say what was found, from the record of an export and of its run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_DATA: dict[str, tuple[str, str | None]] = {
    "cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "cifar100": ("CIFAR-100", "uoft-cs/cifar100"),
    "digits": ("scikit-learn's handwritten digits", None),
}


def data_title(name: str) -> tuple[str, str | None]:
    """How people call a data set, and its identifier on the hub (None if it has none)."""
    return _DATA.get(name, (name, None))


def results(export: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Scores on the test set, how many runs they stand on, and calibration."""
    metrics = export["test_metrics"]
    rows = [("accuracy", percent(metrics["accuracy"]))]
    if metrics.get("top5") is not None:
        rows.append(("top-5 accuracy", percent(metrics["top5"])))
    rows += [
        (title, number(metrics.get(key)))
        for title, key in (("NLL (nats)", "nll"), ("ECE (15 bins)", "ece"), ("Brier score (0 to 2)", "brier"))
    ]
    weights = (
        "the last epoch" if export["student"]["weights"] == "last" else "the epoch best on validation images"
    )
    text = (
        f"## Results\n\nOn all {metrics['images']:,} test images, weights of {weights}. **One run, one seed "
        f"(n = 1, seed {export['seed']}): it has no interval, and says nothing of the method's mean.**\n\n"
        + table(("", "test"), rows)
    )
    whole = len(export["student"]["branches"]) == export["student"]["of_branches"]
    temperature = result.get("calibration_temperature")
    if whole and export["student"]["weights"] == "last" and temperature is not None:
        after = result.get("test_ece_calibrated")
        text += (
            f"\n\nCalibration: dividing the logits by {temperature:.3g}, fitted on the run's validation images, "
            f"gives an ECE of {number(after)}. The files return logits as they are."
        )
    elif metrics.get("ece") is not None:
        text += "\n\nThe probabilities are as trained; no temperature has been fitted for these files."
    return text


def training(export: Mapping[str, Any]) -> str:
    """Data, loss, recipe and teachers."""
    data, method, recipe = export["data"], export["method"], export["recipe"]
    title = data_title(data["name"])[0]
    share = f" ({100 * data['fraction']:g} % of the training set)" if data.get("fraction") is not None else ""
    terms = ", ".join(f"`{name}` {weight:g}" for name, weight in method["terms"].items())
    text = (
        f"## Training\n\n{title}: {data['num_train_images']:,} training images{share}, "
        f"{data['num_val_images']:,} validation images taken from the same subset. Loss terms and weights: {terms}; "
        f"temperature {method['temperature']:g}"
        + (f"; assignment `{method['assignment']}`" if isinstance(method["assignment"], str) else "")
        + f". {recipe['epochs']} epochs, batches of {recipe['batch_size']}, learning rate {recipe['lr']:g} "
        f"({recipe['schedule']}), momentum {recipe['momentum']:g}, weight decay {recipe['weight_decay']:g}."
    )
    if method["teachers"]:
        rows = [
            (
                f"`{teacher.get('id')}`",
                teacher.get("network", ""),
                percent(teacher.get("test_accuracy")),
                str(teacher.get("trained_on", "")),
                f"`{str(teacher.get('sha256'))[:16]}…`",
            )
            for teacher in method["teachers"]
        ]
        head = ("teacher", "network", "test accuracy", "trained on", "SHA-256")
        text += "\n\n" + table(head, rows)
    return text


def cost(export: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Parameters, multiply-accumulates, seconds."""
    hardware, student = export["run"]["hardware"], export["student"]
    machine = (
        ", ".join(hardware.get("gpus") or []) or f"{hardware.get('cpu')}, {hardware.get('threads')} thread(s)"
    )
    text = f"## Cost\n\n{student['num_parameters']:,} parameters, {student['macs']:,} multiply-accumulates an image. "
    if result.get("train_seconds") is not None:
        text += f"Training took {result['train_seconds']:,.0f} s on {machine}."
    if result.get("latency_ms_batch1") is not None and len(student["branches"]) == student["of_branches"]:
        text += (
            f" One image takes {result['latency_ms_batch1']:.2f} ms on {result.get('efficiency_device')} with "
            f"{result.get('efficiency_threads')} thread(s), in PyTorch with batch norm folded."
        )
    return text


def limits(export: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What the network cannot do, what it is weakest at, and what nobody measured."""
    classes, size = export["class_names"], export["image_size"]
    points = [
        f"It knows its {len(classes)} classes only, and gives one of them to any image whatsoever.",
        f"It was trained and tested on {size}×{size} images of one data set; photographs scaled down to that size "
        "are another distribution.",
    ]
    if result.get("partial"):
        points.insert(0, "**It is of a debugging run, which saw a part of the data only.**")
    accuracies = export["test_metrics"].get("class_accuracy") or []
    ranked = sorted((a, name) for a, name in zip(accuracies, classes, strict=True) if a is not None)
    if len(ranked) > 1:
        weak = " and ".join(f"{name} ({percent(a)})" for a, name in ranked[:2])
        points.append(f"It is weakest on {weak}, strongest on {ranked[-1][1]} ({percent(ranked[-1][0])}).")
    if result.get("corruption_mce") is not None:
        points.append(
            f"On corrupted test images ({result.get('corruption_source')}) the run's student is wrong on "
            f"{percent(result['corruption_mce'])} of them in the mean."
        )
    else:
        points.append("Nothing was measured on corrupted or shifted images.")
    if any(teacher.get("trained_on") in ("published", "all") for teacher in export["method"]["teachers"]):
        points.append(
            "Teachers had seen all training images, also those that the student did not see and those of its "
            "validation split: its accuracy is not that of learning from the labelled images alone."
        )
    points.append("Nothing was done about, or measured of, fairness, privacy of training images, or attacks.")
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def origin(export: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Hashes, commit, time and versions."""
    run, data = export["run"], export["data"]
    lines = [
        ("student's weights, SHA-256", export["student"]["sha256"]),
        ("test images, SHA-256", data["test_sha256"]),
        ("training subset, SHA-256", data["subset_sha256"]),
        ("commit", run.get("commit")),
        ("run started", run.get("started")),
        ("PyTorch in training", (run.get("packages") or {}).get("torch")),
        ("precision of the training", result.get("precision")),
    ]
    return "## Origin\n\n" + "\n".join(f"- {name}: `{value}`" for name, value in lines if value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: Any) -> str:
    """A share of 1 in per cent."""
    return "not known" if value is None else f"{100 * value:.2f} %"


def number(value: Any) -> str:
    """Four decimals."""
    return "not known" if value is None else f"{value:.4f}"


def count(n: int, what: str) -> str:
    """A number of things, in the plural if need be."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
