"""Writes the student of a finished run as files for use, and keeps only those that say what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ekd_lightning.errors import UserError, require
from ekd_lightning.evaluation.predict import Agreement, compare_logits, default_tolerance, predict_logits
from ekd_lightning.files import DamagedFileError, file_sha256, read_json, remove_parts, replacing, write_json
from ekd_lightning.networks import BranchedStudent, cut_branches, fold_branches, load_deployed
from ekd_lightning.networks.deploy import SUFFIXES, DeployedStudent, pack_metadata, quantize_onnx, to_bytes
from ekd_lightning.pipeline.context import EvaluationContext, load_own_student
from ekd_lightning.pipeline.export_metadata import describe_export, measure
from ekd_lightning.progress import advance, part
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.writer import now
from ekd_lightning.training.checkpoints import read_checkpoint

EXPORT = "export.json"
INT8 = "student.int8.onnx"
WEIGHTS = {"last": "", "best": "student.", "ema": "ema.module."}
"""What may be exported, and what the names of these weights begin with in a checkpoint."""
_CALIBRATION_BATCH = 64
_PATIENCE_SECONDS = 3600.0  # for another export into the same folder


class CheckFailedError(Exception):
    """A written file does not say what the student says; it has been removed."""


@dataclass(frozen=True)
class ExportOptions:
    """What is to be written.

    Attributes:
        formats: Some of `SUFFIXES`, each once.
        branches: Which branches are kept, in this order; None for all.
        weights: One of `WEIGHTS`, for the student's record.
        fold_branches: Whether the branches become one head, where that is exact.
        fold_batch_norm: Whether batch norms are folded into the convolutions before them.
        probabilities: Whether files return probabilities beside logits.
        int8: Whether an ONNX file quantised to int8 is written, too.
        calibration_images: Training images of which int8 takes its ranges, at least 1.
        max_drop: By how much of 1 the accuracy of the int8 file may be lower.
        tolerance: Largest |Δlogit| of the others; None for `default_tolerance`.
    """

    formats: tuple[str, ...]
    branches: tuple[int, ...] | None = None
    weights: str = "last"
    fold_branches: bool = False
    fold_batch_norm: bool = True
    probabilities: bool = False
    int8: bool = False
    calibration_images: int = 512
    max_drop: float = 0.02
    tolerance: float | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files."""
        return (*(f"student{SUFFIXES[name]}" for name in self.formats), *((INT8,) if self.int8 else ()))


def load_weights(run: RunDirectory, weights: str) -> BranchedStudent:
    """The run's student with other weights than those after the last epoch.

    Args:
        run: The run.
        weights: `best`, of the best epoch by validation accuracy, or `ema`, the moving average.

    Raises:
        UserError: If there is no such checkpoint, or it lacks these weights, is damaged or another student's.
    """
    path, prefix = run.best_checkpoint if weights == "best" else run.last_checkpoint, WEIGHTS[weights]
    if not path.is_file():
        why = "it had no validation images, or it was removed" if weights == "best" else "it was removed"
        raise UserError(f"--weights {weights}: the run has no {path} ({why})")
    state = read_checkpoint(path, run.identity).get("state_dict", {})
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if weights == "ema" and not own:
        raise UserError(f"--weights ema: the run has no moving average (recipe.ema=0), see {path}")
    student = load_own_student(run)
    try:
        student.load_state_dict(own, strict=True)
    except (RuntimeError, AttributeError):
        raise UserError(f"{path}: not a checkpoint of this run's student") from None
    return student.eval()


def read_export(folder: Path) -> dict[str, Any] | None:
    """Content of a folder's export.json; None without one.

    Raises:
        UserError: If it is damaged.
    """
    path = folder / EXPORT
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except DamagedFileError:
        content = {}
    if isinstance(content.get("files"), dict) and isinstance(content.get("student"), dict):
        return content
    raise UserError(f"{path}: damaged, or not written by ekd-export; choose another folder with -o")


def refuse_existing(folder: Path, options: ExportOptions, force: bool) -> None:
    """Refuses to overwrite; needs nothing but the folder.

    Raises:
        UserError: If the folder holds one of the files, and not `force`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; exports go to a folder")
    read_export(folder)
    there = [name for name in options.files if (folder / name).exists()]
    if there and not force:
        raise UserError(f"{folder / there[0]} exists (--force overwrites it, -o names another folder)")


def exporting(folder: Path) -> DirectoryLock:
    """The lock of a folder while files are exported there, made if it is missing; another export waits for it."""
    return DirectoryLock(folder, patience=_PATIENCE_SECONDS)


def export_student(
    context: EvaluationContext,
    provenance: Mapping[str, Any],
    folder: Path,
    options: ExportOptions,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Writes the files, checks each on all test images, and records them in export.json.

    To be called under the lock of the folder, `exporting`. A file appears under its name only after its check. Files of
    the same student that are in the folder stay and keep their place in export.json.

    Args:
        context: The run; its student has the weights that are to be exported, on the CPU.
        provenance: Content of the run's provenance.json.
        folder: Where to; made if missing.
        options: What to write.
        force: Whether to overwrite, and to replace the export of another student.

    Returns:
        The content of export.json.

    Raises:
        UserError: If branches are not there or do not fold, a file exists, the folder holds another student, or a
            package is missing.
        CheckFailedError: If a file does not say what the student says.
    """
    refuse_existing(folder, options, force)
    if options.int8 or "onnx" in options.formats:
        require("export", "onnx", "onnxscript", "onnxruntime")
    branches = options.branches or tuple(range(context.student.num_branches))
    student = cut_branches(context.student, branches).eval()
    test = context.dataset.test
    batch_size = context.settings.data.eval_batch_size
    reference = predict_logits(student, test, batch_size)
    metrics = measure(reference, test.labels)
    if options.fold_branches:
        student = fold_branches(student)
    metadata = describe_export(context, provenance, student, branches, options.weights, metrics)
    deployed = DeployedStudent(student, fold=options.fold_batch_norm, probabilities=options.probabilities)
    record = _record(folder, {**metadata, "spec": deployed.spec}, force)
    tolerance = default_tolerance(reference) if options.tolerance is None else options.tolerance
    remove_parts(folder)  # of an export that was killed
    for name, facts, content in _contents(context, deployed, metadata, options):
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
            with part(f"checking {name}:"):
                logits = predict_logits(load_deployed(temporary), test, batch_size)
            found = compare_logits(logits, reference, test.labels, tolerance)
            _require_agreement(folder / name, found, None if facts["precision"] == "float32" else options.max_drop)
        record["files"][name] = {**facts, **_file_facts(folder / name, found)}
        write_json(folder / EXPORT, record)
        advance()
    return record


def _record(folder: Path, metadata: dict[str, Any], force: bool) -> dict[str, Any]:
    """export.json as it is before the first file: that of the same student goes on."""
    old = read_export(folder)
    if old and old["student"] == metadata["student"]:
        return {**old, **metadata, "files": dict(old["files"])}
    if old and not force:
        raise UserError(f"{folder} holds the export of another student (--force replaces it, -o names another folder)")
    for name in old["files"] if old else ():
        (folder / Path(name).name).unlink(missing_ok=True)
    return {**metadata, "files": {}}


def _contents(
    context: EvaluationContext, deployed: DeployedStudent, metadata: dict[str, Any], options: ExportOptions
) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Name, facts and content of each file."""
    onnx: bytes | None = None
    for file_format in options.formats:
        facts = {"format": file_format, "precision": "float32", "folded": options.fold_batch_norm}
        facts["outputs"] = deployed.outputs
        with part(f"writing {file_format}"):
            content = to_bytes(deployed, {**metadata, "precision": "float32"}, file_format)
        onnx = content if file_format == "onnx" else onnx
        yield f"student{SUFFIXES[file_format]}", facts, content
    if options.int8:
        onnx = onnx or to_bytes(deployed, metadata, "onnx")
        strings = pack_metadata({**metadata, "precision": "int8", "spec": deployed.spec})
        index = _spread(context.subset.train_index, options.calibration_images)
        facts = {"format": "onnx", "precision": "int8", "folded": True, "outputs": deployed.outputs}
        facts["calibration_images"] = len(index)
        pixels = context.dataset.train.images[index].split(_CALIBRATION_BATCH)
        with part("quantising"):
            content = quantize_onnx(onnx, (some.float().div_(255).numpy() for some in pixels), strings)
        yield INT8, facts, content


def _spread(index: Tensor, count: int) -> Tensor:
    """`count` of the indices, spread evenly, so that a data set sorted by class is covered."""
    count = min(count, len(index))
    return index[torch.linspace(0, len(index) - 1, count).long()]


def _require_agreement(path: Path, found: Agreement, max_drop: float | None) -> None:
    """Refuses a float32 file that differs by more than rounding, an int8 one that is wrong too often."""
    scores = f"accuracy {found.accuracy:.4f}, the student's {found.reference_accuracy:.4f}"
    if max_drop is None and not found.is_same:
        raise CheckFailedError(
            f"{path} does not say what the student says and was removed: max |Δlogit| {found.max_difference:.3g}, "
            f"allowed {found.tolerance:.3g}; {found.changed_clearly} predictions of {found.images} changed; {scores}"
        )
    if max_drop is not None and not found.reference_accuracy - found.accuracy <= max_drop:
        raise CheckFailedError(
            f"{path} loses more accuracy than --max-drop {max_drop:g} allows and was removed: {scores}"
        )


def _file_facts(path: Path, found: Agreement) -> dict[str, Any]:
    facts = found._asdict()
    return {
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        **{name: value for name, value in facts.items() if name != "tolerance"},
        "accuracy_difference": round(found.accuracy - found.reference_accuracy, 12),
        "tolerance": found.tolerance if found.is_same else None,
        "written": now(),
    }
