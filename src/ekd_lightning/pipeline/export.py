"""Export of a finished run's student; only files that reproduce its outputs are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekd_lightning.errors import UserError, require
from ekd_lightning.evaluation.predict import Agreement, compare_logits, default_tolerance, predict_logits
from ekd_lightning.evaluation.robustness import spread_index
from ekd_lightning.files import DamagedFileError, file_sha256, read_json, remove_parts, replacing, write_json
from ekd_lightning.networks import BranchedStudent, cut_branches, fold_branches
from ekd_lightning.networks.deploy import SUFFIXES, DeployedStudent, pack_metadata, quantize_onnx, to_bytes
from ekd_lightning.networks.deployed import load_deployed
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
"""Weights that can be exported, with the prefix of their names in a checkpoint."""
_CALIBRATION_BATCH = 64
_PATIENCE_SECONDS = 3600.0  # for another export into the same folder


class CheckFailedError(Exception):
    """A written file does not reproduce the student's outputs; it has been removed."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        formats: Formats, keys of `SUFFIXES`, each once.
        branches: Branches to keep, in this order; None for all.
        weights: Key of `WEIGHTS`, for the student's record.
        fold_branches: Whether the branches are folded into one head, which must be exact.
        fold_batch_norm: Whether batch norms are folded into the convolutions before them.
        probabilities: Whether files return probabilities besides logits.
        int8: Whether an ONNX file quantised to int8 is written, too.
        calibration_images: Training images that set the ranges of int8, at least 1.
        max_drop: Largest loss of accuracy, in [0, 1], of the int8 file.
        tolerance: Largest |Δlogit| of the float32 files; None for `default_tolerance`.
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
        """Names of the files to write."""
        return (*(f"student{SUFFIXES[name]}" for name in self.formats), *((INT8,) if self.int8 else ()))


def load_weights(run: RunDirectory, weights: str) -> BranchedStudent:
    """Loads the run's student with other weights than those after the last epoch.

    They are `best`, of the epoch with the best validation accuracy, or `ema`, the moving average.

    Raises:
        UserError: If the checkpoint is missing or damaged, lacks these weights, or is of another student.
    """
    path, prefix = run.best_checkpoint if weights == "best" else run.last_checkpoint, WEIGHTS[weights]
    if not path.is_file():
        why = "no validation images, or removed" if weights == "best" else "removed"
        raise UserError(f"--weights {weights}: the run has no {path} ({why}); --weights last needs none")
    state = read_checkpoint(path, run.identity).get("state_dict", {})
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if weights == "ema" and not own:
        raise UserError(f"--weights ema: the run has no moving average (recipe.ema=0), so {path} does not hold one")
    student = load_own_student(run)
    try:
        student.load_state_dict(own, strict=True)
    except (RuntimeError, AttributeError):
        raise UserError(f"{path}: not a checkpoint of this run's student") from None
    return student.eval()


def read_export(folder: Path) -> dict[str, Any] | None:
    """Reads a folder's export.json; None if there is none. A damaged one is a `UserError`."""
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
    """Refuses a folder that holds one of the files (without `force`), or a damaged export.json, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose a folder with -o")
    read_export(folder)
    existing = [name for name in options.files if (folder / name).exists()]
    if existing and not force:
        raise UserError(f"{folder / existing[0]} exists (--force overwrites it, -o names another folder)")


def exporting(folder: Path) -> DirectoryLock:
    """Returns the lock of a folder, for the time of an export; the folder is made if missing, other exports wait."""
    return DirectoryLock(folder, patience=_PATIENCE_SECONDS)


def export_student(
    context: EvaluationContext,
    provenance: Mapping[str, Any],
    folder: Path,
    options: ExportOptions,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Writes the files, checks each on all test images, and records them in export.json, whose content is returned.

    The caller must hold the folder's lock, see `exporting`. The context's student, on the CPU, has the weights to
    export. A file gets its name only after its check. Files of the same student in the folder are kept, with their
    entries in export.json. `force` overwrites files, and replaces the export of another student.

    Raises:
        UserError: If a branch does not exist, branches do not fold, a file exists, the folder holds another student, or
            a package is missing.
        CheckFailedError: If a file does not reproduce the student's outputs.
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
    remove_parts(folder)  # files of a killed export
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
    """Returns export.json before the first file: that of an earlier export of the same student, or a new one."""
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
    """Yields name, facts and content of each file."""
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
        known = context.subset.train_index
        index = known[spread_index(len(known), options.calibration_images)]  # covers a data set sorted by class
        facts = {"format": "onnx", "precision": "int8", "folded": True, "outputs": deployed.outputs}
        facts["calibration_images"] = len(index)
        pixels = context.dataset.train.images[index].split(_CALIBRATION_BATCH)
        with part("quantising"):
            content = quantize_onnx(onnx, (some.float().div_(255).numpy() for some in pixels), strings)
        yield INT8, facts, content


def _require_agreement(path: Path, found: Agreement, max_drop: float | None) -> None:
    """Refuses a float32 file that differs by more than rounding, and an int8 file that loses too much accuracy."""
    scores = f"accuracy {found.accuracy:.4f}, the student's {found.reference_accuracy:.4f}"
    if max_drop is None and not found.is_same:
        raise CheckFailedError(
            f"{path} does not reproduce the student and was removed: max |Δlogit| {found.max_difference:.3g}, "
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
