"""Model card of an exported student: README.md with the header that the Hugging Face hub reads.

All its content comes from the records of the export and of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ekd_lightning import markdown as md
from ekd_lightning.errors import UserError
from ekd_lightning.files import file_sha256, write_json, write_text
from ekd_lightning.pipeline.export import EXPORT
from ekd_lightning.reporting.estimates import listed, plural

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
_METRICS = {
    "accuracy": ("accuracy", "accuracy", ".2%"),
    "top5": (None, "top-5 accuracy", ".2%"),
    "nll": ("nll", "NLL (nats)", ".4f"),
    "ece": ("expected_calibration_error", "ECE (15 bins)", ".4f"),
    "brier": ("brier_score", "Brier score (0 to 2)", ".4f"),
}
"""Metric of the export's record -> type on the hub (None if it has none), title in the text, format."""
_MANY = 12
"""Largest number of classes that the text names in full."""


def model_card(export: Mapping[str, Any], result: Mapping[str, Any], *, license_id: str | None = None) -> str:
    """The card, filled from export.json and result.json, as Markdown with a YAML header; names are escaped.

    Without a licence the choice is left to the reader.
    """
    student, method, metrics = export["student"], export["method"], export["test_metrics"]
    teachers, classes, hardware = method["teachers"], export["class_names"], export["run"]["hardware"]
    scored = zip(metrics.get("class_accuracy") or [], classes, strict=False)
    size = export["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    values = {
        **export,
        "license": license_id,
        "header": _header(export, license_id),
        "height": height,
        "width": width,
        "name": model_name(export),
        "structure": md.Markdown("; ".join([*_options(export), _structure(export)])),
        "taught": plural(len(teachers), "frozen teacher") if teachers else "labels alone",
        "classes": ", ".join(classes if len(classes) <= _MANY else classes[:5])
        + (f" and {len(classes) - 5} more" if len(classes) > _MANY else ""),
        "file_rows": list(_file_rows(export)),
        "metric_rows": [
            (title, md.known(metrics.get(key), form))
            for key, (_, title, form) in _METRICS.items()
            if key != "top5" or metrics.get(key) is not None
        ],
        "teacher_rows": [
            (
                md.code(one.get("id")),
                one.get("network", ""),
                md.known(one.get("test_accuracy"), ".2%"),
                one.get("trained_on", ""),
                md.code(f"{str(one.get('sha256'))[:16]}…"),
            )
            for one in teachers
        ],
        "result": {key: result[key] for key in result},
        "whole": len(student["branches"]) == student["of_branches"],
        "data_title": _DATA.get(export["data"]["name"], (export["data"]["name"], None))[0],
        "machine": ", ".join(hardware.get("gpus") or [])
        or f"{hardware.get('cpu')}, {hardware.get('threads')} thread(s)",
        "ranked": sorted((accuracy, name) for accuracy, name in scored if accuracy is not None),
        **_seen_by(teachers),
        "origin": _origin(export, result),
    }
    return md.fill("ekd_lightning.reporting", "model_card.md", values)


def refuse_foreign_card(folder: Path, export: Mapping[str, Any] | None, *, force: bool) -> None:
    """Refuses a folder with a README.md that is not the card of an earlier export."""
    if export is None and (folder / CARD).exists() and not force:
        raise UserError(f"{folder / CARD}: exists and is not the model card of an export; --force overwrites it")


def write_card(
    export: Mapping[str, Any], result: Mapping[str, Any], folder: Path, *, license_id: str | None, force: bool
) -> str:
    """Writes the card, unless the existing card was edited after it was written; returns a line that tells which."""
    path = folder / CARD
    if path.is_file() and not force and file_sha256(path) != export.get("card_sha256"):
        return f"model card: {path} was edited and is kept (--force overwrites it)"
    write_text(path, model_card(export, result, license_id=license_id))
    write_json(folder / EXPORT, {**export, "card_sha256": file_sha256(path)})
    return f"model card: {path}"


def model_name(export: Mapping[str, Any]) -> str:
    """A short name: method, data set, network, branches."""
    student = export["student"]
    network = export["spec"]["network"]["name"]
    branches = 1 if student.get("one_head") else len(student["branches"])
    return f"{export['method']['name']}-{export['data']['name']}-{network}x{branches}"


def _header(export: Mapping[str, Any], license_id: str | None) -> md.Markdown:
    data = export["data"]["name"]
    title, hub = _DATA.get(data, (data, None))
    metrics = export["test_metrics"]
    entry = {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {"name": title, "type": hub or data, "split": "test"},
        "metrics": [
            {"type": kind, "value": round(metrics[key], 6), "name": f"Test {kind.replace('_', ' ')}"}
            for key, (kind, _, _) in _METRICS.items()
            if kind and metrics.get(key) is not None
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
    return md.Markdown(yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=100).rstrip())


def _seen_by(teachers: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """The teachers that saw all training images, and those of which it is not known, for a sentence each."""
    everything = [one for one in teachers if one.get("source") == "zoo" or one.get("trained_on") == "all"]
    unknown = [one for one in teachers if one not in everything and one.get("trained_on") != "subset"]

    def named(some: Sequence[Mapping[str, Any]], all_of_them: str) -> str | None:
        ids = md.Markdown(listed([md.code(one.get("id")) for one in some]))
        return (all_of_them if len(some) == len(teachers) else ids) if some else None

    return {"saw_everything": named(everything, "Teachers"), "saw_unknown": named(unknown, "the teachers")}


def _options(export: Mapping[str, Any]) -> list[str]:
    """The network's options, such as its width, where they are not the usual ones."""
    return [md.code(f"{name}={value}") for name, value in (export["spec"]["network"].get("options") or {}).items()]


def _structure(export: Mapping[str, Any]) -> str:
    student, spec = export["student"], export["spec"]
    kept, of = student["branches"], student["of_branches"]
    if of == 1:
        return "a plain network"
    branches = f"{len(kept)} branches" if len(kept) > 1 else "one branch"
    if len(kept) < of:
        branches += f" ({', '.join(map(str, kept))} of the {of} it was trained with, counted from 0)"
    if student.get("one_head"):
        return md.Markdown(f"a plain network, whose head is the mean of the heads of {branches}")
    shared = f"over a trunk shared up to {md.code(spec['split_after'])}"
    trunk = "that share nothing" if spec["split_after"] == "none" else shared
    coupled = f", coupled by {_COUPLING[spec['ensemble']]}" if len(kept) > 1 else ""
    return md.Markdown(f"{branches} {trunk}{coupled}")


def _file_rows(export: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, facts in export["files"].items():
        allowed = f" (allowed {facts['tolerance']:.2g})" if facts["tolerance"] is not None else ""
        yield (
            md.code(name),
            facts["precision"] + (", batch norm folded" if facts["folded"] else ""),
            f"{facts['bytes'] / 1000:,.1f}",
            f"{100 * facts['accuracy']:.2f}",
            f"{100 * facts['accuracy_difference']:+.2f}",
            f"{facts['max_difference']:.2g}{allowed}",
            f"{facts['changed']} of {facts['images']:,}",
        )


def _origin(export: Mapping[str, Any], result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    run, data = export["run"], export["data"]
    return [
        ("student's weights, SHA-256", export["student"]["sha256"]),
        ("test images, SHA-256", data["test_sha256"]),
        ("training subset, SHA-256", data["subset_sha256"]),
        ("commit", run.get("commit")),
        ("run started", run.get("started")),
        ("PyTorch in training", (run.get("packages") or {}).get("torch")),
        ("precision of the training", result.get("precision")),
    ]
