"""The model card of an exported student: README.md with the header that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ekd_lightning.reporting.model_card_sections import (
    cost,
    count,
    data_title,
    limits,
    origin,
    results,
    table,
    training,
)

_COUPLING = {
    "mean_logits": "the mean of their logits",
    "mean_probs": "the logarithm of the mean of their probabilities",
    "gate": "the mean of their logits, weighted image by image by a learned gate",
}
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
    parts = [
        _header(export, license_id),
        _what(export),
        _use(export),
        _files(export),
        results(export, result),
        training(export),
        cost(export, result),
        limits(export, result),
        origin(export, result),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def model_name(export: Mapping[str, Any]) -> str:
    """A short name: method, data set, network, branches."""
    student = export["student"]
    network = export["spec"]["network"]["name"]
    return f"{export['method']['name']}-{export['data']['name']}-{network}x{len(student['branches'])}"


def _header(export: Mapping[str, Any], license_id: str | None) -> str:
    data = export["data"]["name"]
    title, hub = data_title(data)
    metrics = export["test_metrics"]
    shown = (
        ("accuracy", "accuracy"),
        ("nll", "nll"),
        ("expected_calibration_error", "ece"),
        ("brier_score", "brier"),
    )
    entry = {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {"name": title, "type": hub or data, "split": "test"},
        "metrics": [
            {"type": kind, "value": round(metrics[key], 6), "name": f"Test {kind.replace('_', ' ')}"}
            for kind, key in shown
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
        "that share nothing"
        if spec["split_after"] == "none"
        else f"over a trunk shared up to `{spec['split_after']}`"
    )
    structure = f"{branches} {trunk}{coupled}" if of > 1 else "a plain network"
    teachers = method["teachers"]
    taught = (
        f"learned from {count(len(teachers), 'frozen teacher')}" if teachers else "learned from labels alone"
    )
    classes = export["class_names"]
    named = (
        ", ".join(classes)
        if len(classes) <= _MANY
        else f"{', '.join(classes[:5])} and {len(classes) - 5} more"
    )
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
    head = (
        "file",
        "weights",
        "kB",
        "test accuracy %",
        "against the student",
        "max abs. logit difference",
        "changed",
    )
    rows = []
    for name, facts in export["files"].items():
        allowed = f" (allowed {facts['tolerance']:.2g})" if facts["tolerance"] is not None else ""
        rows.append(
            (
                f"`{name}`",
                facts["precision"] + (", batch norm folded" if facts["folded"] else ""),
                f"{facts['bytes'] / 1000:,.1f}",
                f"{100 * facts['accuracy']:.2f}",
                f"{100 * facts['accuracy_difference']:+.2f}",
                f"{facts['max_difference']:.2g}{allowed}",
                f"{facts['changed']} of {facts['images']:,}",
            )
        )
    return (
        "## Files\n\nEach file was read back and asked about every test image; the PyTorch student, in float32, "
        "answered the same images. Hashes, and the versions it was made with, are in `export.json`.\n\n"
        + table(head, rows)
    )
