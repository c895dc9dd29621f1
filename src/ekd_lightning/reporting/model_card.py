"""Model card of an exported student: README.md with the header that the Hugging Face hub reads.

What it says is taken from the record of the export and of its run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ekd_lightning.errors import UserError
from ekd_lightning.files import file_sha256, write_json, write_text
from ekd_lightning.pipeline.export import EXPORT

CARD = "README.md"
_COUPLING = {
    "mean_logits": "the mean of their logits",
    "mean_probs": "the logarithm of the mean of their probabilities",
    "gate": "the mean of their logits, weighted image by image by a learned gate",
}
_DATA: dict[str, tuple[str, str | None]] = {
    "cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "cifar100": ("CIFAR-100", "uoft-cs/cifar100"),
    "digits": ("scikit-learn's handwritten digits", None),
}
_METRICS = {"accuracy": "accuracy", "nll": "nll", "expected_calibration_error": "ece", "brier_score": "brier"}.items()
"""Names of the hub, and ours."""
_FILES = ("file", "weights", "kB", "test accuracy %", "against the student", "max abs. logit difference", "changed")
_MANY = 12  # classes beyond that are not all named in the text


def model_card(export: Mapping[str, Any], result: Mapping[str, Any], *, license_id: str | None = None) -> str:
    """Fills the card from what is recorded; nothing in it is measured or claimed anew.

    Args:
        export: Content of export.json.
        result: Content of the run's result.json.
        license_id: Identifier of the licence, as the hub knows them; None leaves the choice to the reader.

    Returns:
        Markdown with a YAML header.
    """
    parts = [_header(export, license_id), _what(export), _use(export), _files(export)]
    parts += [_results(export, result), _training(export), _cost(export, result), _limits(export, result)]
    parts.append(_origin(export, result))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def refuse_foreign_card(folder: Path, export: Mapping[str, Any] | None, *, force: bool) -> None:
    """Refuses a folder whose card is none of an export.

    Args:
        folder: Of the export.
        export: Content of its export.json; None without.
        force: Whether it may be overwritten.

    Raises:
        UserError: If there is such a card.
    """
    if export is None and (folder / CARD).exists() and not force:
        raise UserError(f"{folder / CARD} exists and is no model card of an export (--force overwrites it)")


def write_card(
    export: Mapping[str, Any], result: Mapping[str, Any], folder: Path, *, license_id: str | None, force: bool
) -> str:
    """Writes the card, unless somebody has edited it since it was written.

    Returns:
        What was done, in one line.
    """
    path = folder / CARD
    if path.is_file() and not force and file_sha256(path) != export.get("card_sha256"):
        return f"model card: {path} was edited and is left as it is (--force writes it anew)"
    write_text(path, model_card(export, result, license_id=license_id))
    write_json(folder / EXPORT, {**export, "card_sha256": file_sha256(path)})
    return f"model card: {path}"


def model_name(export: Mapping[str, Any]) -> str:
    """A short name: method, data set, network, branches."""
    student = export["student"]
    network = export["spec"]["network"]["name"]
    return f"{export['method']['name']}-{export['data']['name']}-{network}x{len(student['branches'])}"


def _header(export: Mapping[str, Any], license_id: str | None) -> str:
    data = export["data"]["name"]
    title, hub = _data_title(data)
    metrics = export["test_metrics"]
    entry = {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {"name": title, "type": hub or data, "split": "test"},
        "metrics": [
            {"type": kind, "value": round(metrics[key], 6), "name": f"Test {kind.replace('_', ' ')}"}
            for kind, key in _METRICS
            if metrics.get(key) is not None
        ],
    }
    header: dict[str, Any] = {"license": license_id} if license_id else {}
    header |= {
        "library_name": "ekd-lightning",
        "pipeline_tag": "image-classification",
        "tags": [
            "image-classification",
            "knowledge-distillation",
            "ensemble-knowledge-distillation",
            "model-compression",
            *sorted({facts["format"] for facts in export["files"].values()}),
        ],
        **({"datasets": [hub]} if hub else {}),
        "metrics": ["accuracy"],
        "model-index": [{"name": model_name(export), "results": [entry]}],
    }
    text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=100)
    choice = "" if license_id else "# license: yours to choose before you publish, e.g. `license: mit`\n"
    return f"---\n{choice}{text}---"


def _what(export: Mapping[str, Any]) -> str:
    student, spec, method = export["student"], export["spec"], export["method"]
    kept, of = student["branches"], student["of_branches"]
    branches = f"{len(kept)} branches" if len(kept) > 1 else "one branch"
    if len(kept) < of:
        which = ", ".join(map(str, kept))
        branches += f" ({which} of the {of} it was trained with, counted from 0)"
    coupled = f", coupled by {_COUPLING[spec['ensemble']]}" if len(kept) > 1 else ""
    trunk = (
        "that share nothing" if spec["split_after"] == "none" else f"over a trunk shared up to `{spec['split_after']}`"
    )
    structure = f"{branches} {trunk}{coupled}" if of > 1 else "a plain network"
    teachers = method["teachers"]
    taught = f"learned from {_count(len(teachers), 'frozen teacher')}" if teachers else "learned from labels alone"
    classes = export["class_names"]
    named = ", ".join(classes) if len(classes) <= _MANY else f"{', '.join(classes[:5])} and {len(classes) - 5} more"
    return (
        f"# {model_name(export)}\n\n"
        f"A {spec['network']['name']} student ({structure}), {student['num_parameters']:,} parameters and "
        f"{student['macs']:,} multiply-accumulates an image, that {taught} with the method `{method['name']}` of "
        f"ekd-lightning {export['library']['version']}.\n\n"
        f"It tells {len(classes)} classes of RGB images of {export['image_size']}×{export['image_size']} pixels "
        f"apart: {named}."
    )


def _use(export: Mapping[str, Any]) -> str:
    size, names = export["image_size"], list(export["files"])
    images = f"images = torch.rand(4, 3, {size}, {size})  # yours: RGB, float32 in [0, 1], not normalised"
    text = [
        "## Use",
        "One call, whatever the format; neither PyTorch Lightning nor Hydra is imported:",
        f'```python\nimport torch\n\nimport ekd_lightning\n\nmodel = ekd_lightning.load("{names[0]}")\n{images}\n'
        "logits = model(images)  # [4, classes]\nprint(model.classify(images))  # class name, probability\n```",
    ]
    if "student.onnx" in names:
        text.append(
            "The ONNX file without this package:\n\n```python\nimport onnxruntime\nimport torch\n\n"
            f'session = onnxruntime.InferenceSession("student.onnx")\n{images}\n'
            'logits = session.run(["logits"], {"images": images.numpy()})[0]\n```'
        )
    if "student.pt2" in names:
        several = "[0]" if len(export["files"]["student.pt2"]["outputs"]) > 1 else ""
        text.append(
            "The torch.export program without this package:\n\n```python\nimport torch\n\n"
            f'program = torch.export.load("student.pt2").module()\n{images}\nlogits = program(images){several}\n```'
        )
    return "\n\n".join(text)


def _files(export: Mapping[str, Any]) -> str:
    rows = []
    for name, facts in export["files"].items():
        weights = facts["precision"] + (", batch norm folded" if facts["folded"] else "")
        allowed = f" (allowed {facts['tolerance']:.2g})" if facts["tolerance"] is not None else ""
        accuracy = f"{100 * facts['accuracy']:.2f}", f"{100 * facts['accuracy_difference']:+.2f}"
        logits = f"{facts['max_difference']:.2g}{allowed}", f"{facts['changed']} of {facts['images']:,}"
        rows.append((f"`{name}`", weights, f"{facts['bytes'] / 1000:,.1f}", *accuracy, *logits))
    return (
        "## Files\n\nEach file was read back and asked about every test image; the PyTorch student, in float32, "
        "answered the same images. Hashes, and the versions it was made with, are in `export.json`.\n\n"
        + _table(_FILES, rows)
    )


def _data_title(name: str) -> tuple[str, str | None]:
    return _DATA.get(name, (name, None))


def _results(export: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    metrics = export["test_metrics"]
    rows = [("accuracy", _percent(metrics["accuracy"]))]
    if metrics.get("top5") is not None:
        rows.append(("top-5 accuracy", _percent(metrics["top5"])))
    rows += [
        (title, _number(metrics.get(key)))
        for title, key in (("NLL (nats)", "nll"), ("ECE (15 bins)", "ece"), ("Brier score (0 to 2)", "brier"))
    ]
    weights = "the last epoch" if export["student"]["weights"] == "last" else "the epoch best on validation images"
    text = (
        f"## Results\n\nOn all {metrics['images']:,} test images, weights of {weights}. **One run, one seed "
        f"(n = 1, seed {export['seed']}): it has no interval, and says nothing of the method's mean.**\n\n"
        + _table(("", "test"), rows)
    )
    whole = len(export["student"]["branches"]) == export["student"]["of_branches"]
    temperature = result.get("calibration_temperature")
    if whole and export["student"]["weights"] == "last" and temperature is not None:
        after = result.get("test_ece_calibrated")
        text += (
            f"\n\nCalibration: dividing the logits by {temperature:.3g}, fitted on the run's validation images, "
            f"gives an ECE of {_number(after)}. The files return logits as they are."
        )
    elif metrics.get("ece") is not None:
        text += "\n\nThe probabilities are as trained; no temperature has been fitted for these files."
    return text


def _training(export: Mapping[str, Any]) -> str:
    data, method, recipe = export["data"], export["method"], export["recipe"]
    title = _data_title(data["name"])[0]
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
                _percent(teacher.get("test_accuracy")),
                str(teacher.get("trained_on", "")),
                f"`{str(teacher.get('sha256'))[:16]}…`",
            )
            for teacher in method["teachers"]
        ]
        head = ("teacher", "network", "test accuracy", "trained on", "SHA-256")
        text += "\n\n" + _table(head, rows)
    return text


def _cost(export: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    hardware, student = export["run"]["hardware"], export["student"]
    machine = ", ".join(hardware.get("gpus") or []) or f"{hardware.get('cpu')}, {hardware.get('threads')} thread(s)"
    text = f"## Cost\n\n{student['num_parameters']:,} parameters, {student['macs']:,} multiply-accumulates an image. "
    if result.get("train_seconds") is not None:
        text += f"Training took {result['train_seconds']:,.0f} s on {machine}."
    if result.get("latency_ms_batch1") is not None and len(student["branches"]) == student["of_branches"]:
        text += (
            f" One image takes {result['latency_ms_batch1']:.2f} ms on {result.get('efficiency_device')} with "
            f"{result.get('efficiency_threads')} thread(s), in PyTorch with batch norm folded."
        )
    return text


def _limits(export: Mapping[str, Any], result: Mapping[str, Any]) -> str:
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
        weak = " and ".join(f"{name} ({_percent(a)})" for a, name in ranked[:2])
        points.append(f"It is weakest on {weak}, strongest on {ranked[-1][1]} ({_percent(ranked[-1][0])}).")
    if result.get("corruption_mce") is not None:
        points.append(
            f"On corrupted test images ({result.get('corruption_source')}) the run's student is wrong on "
            f"{_percent(result['corruption_mce'])} of them in the mean."
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


def _origin(export: Mapping[str, Any], result: Mapping[str, Any]) -> str:
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


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(value: Any) -> str:
    return "not known" if value is None else f"{100 * value:.2f} %"


def _number(value: Any) -> str:
    return "not known" if value is None else f"{value:.4f}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
