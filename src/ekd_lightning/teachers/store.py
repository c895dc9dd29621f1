"""Store of trained teachers, shared by all runs: a folder addressed by hashes of what determines them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from ekd_lightning.data import ImageSet
from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.predict import Predictions, predict
from ekd_lightning.evaluation.scores import score_logits
from ekd_lightning.files import DamagedFileError, UnwritableFileError, move_folder, read_json, write_json
from ekd_lightning.networks import StagedNetwork, load_network, save_network
from ekd_lightning.networks.weights import read_metadata, read_sealed_tensors, write_sealed_tensors

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_FORMAT = 1  # raise it when training changes so that older teachers must not be reused
_WEIGHTS = "teacher.safetensors"
_KEY = "key.json"
_OF = "store_key"  # the key recorded in a file, so that a file copied from another place is noticed
COST = "cost.json"
"""What a training may leave in its scratch folder: numbers of its cost, kept beside the weights."""


class TeacherStore:
    """A content-addressed folder of trained teachers and of their outputs for test sets.

    An entry appears by one rename, after it is complete; a killed training leaves only a folder from which the next
    one goes on. Concurrent runs wait for each other on a lock per entry, so each teacher is trained once.

    Args:
        root: Folder of the store; made when first needed.

    Raises:
        UserError: On use, if the folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def digest(key: Mapping[str, Any]) -> str:
        """SHA-256 of a key; equal keys in any order give equal digests."""
        text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, key: Mapping[str, Any]) -> Path:
        """Path of the weights of `key`, whether they exist or not."""
        return self.weights(self.digest(key))

    def weights(self, digest: str) -> Path:
        """Path of the weights of an entry, by the digest of its key, whether they exist or not."""
        return self.root / "teachers" / digest / _WEIGHTS

    def cost(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the recorded cost of the training of `key`; empty if there is none."""
        return _kept(self.path(key).with_name(COST), read_json, "the cost of its training is unknown") or {}

    def get_or_train(self, key: Mapping[str, Any], train: Callable[[Path], StagedNetwork]) -> StagedNetwork:
        """Loads the teacher of `key`, training it first when the store lacks it.

        Args:
            key: All that determines the teacher, JSON-able.
            train: Trains it; gets the path of a scratch folder that is deleted afterwards. It outlives a training
                that fails or is killed, so that the next one finds its checkpoints there.

        Raises:
            UserError: If the stored weights are damaged. They are not trained again unasked: that is dear, and runs
                that learned from them name them by their hash.
        """
        final = self.path(key).parent
        if not (final / _WEIGHTS).is_file():  # what is there needs no lock: a store may be shared read-only
            with self._lock(final, "training this teacher"):
                self._remove_leftovers(final)
                if not (final / _WEIGHTS).is_file():
                    self._train(final, key, train)
        path = final / _WEIGHTS
        try:
            network = load_network(path)
            if read_metadata(path).get(_OF, final.name) != final.name:
                raise DamagedFileError(f"{path}: replaced, it belongs to another folder of the store")
        except UserError as error:
            raise UserError(f"{error}; delete the folder {final} to have this teacher trained again") from None
        return network

    @staticmethod
    def _train(final: Path, key: Mapping[str, Any], train: Callable[[Path], StagedNetwork]) -> None:
        run, ready = (final.with_name(f"{final.name}.{suffix}") for suffix in ("resume", "part-ready"))
        network = train(run)
        try:
            save_network(ready / _WEIGHTS, network, {"data": str(key.get("data", "")), _OF: final.name})
            write_json(ready / _KEY, dict(key))
            if (run / COST).is_file():
                write_json(ready / COST, read_json(run / COST))
            move_folder(ready, final)
        finally:
            shutil.rmtree(ready, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)

    def test_scores(
        self, network: StagedNetwork, sha256: str, images: ImageSet, batch_size: int, device: torch.device
    ) -> dict[str, Any]:
        """Returns the scores of `test_outputs`."""
        return score_logits(
            self.test_outputs(lambda: network, sha256, images, batch_size, device).logits, images.labels
        )

    def test_outputs(
        self, network: Callable[[], StagedNetwork], sha256: str, images: ImageSet, batch_size: int, device: torch.device
    ) -> Predictions:
        """Returns a teacher's outputs for a test set, computed once per (teacher, test set) and stored if possible.

        Args:
            network: Gives the teacher; not called where its outputs are kept already.
            sha256: Its `answers_sha256`.
            images: The test set.
            batch_size: Images per forward pass.
            device: Where to compute.

        Returns:
            float32 on the CPU.
        """
        digest = self.digest({"teacher": sha256, "images": images.sha256})
        path = self.root / "outputs" / f"{digest}.safetensors"
        read = partial(_read_outputs, count=len(images))
        found = _kept(path, read)  # without a lock: a store may be shared read-only
        if found is not None:
            return found
        with self._lock_or_none(path, "computing this teacher's outputs for the test set"):
            found = _kept(path, read, "its outputs are computed again")
            if found is None:
                found = predict(network().to(device), images, batch_size=batch_size, device=device)
                try:
                    write_sealed_tensors(path, found._asdict(), {_OF: path.stem})
                except UnwritableFileError as error:
                    log.warning("%s: this teacher's outputs for the test set are not stored", error)
        return found

    def _lock_or_none(self, path: Path, doing: str) -> contextlib.AbstractContextManager[object]:
        try:
            return self._lock(path, doing)
        except UnwritableFileError:  # writing will tell
            return contextlib.nullcontext()

    def _lock(self, final: Path, doing: str) -> FileLock:
        lock = FileLock(f"{final}.lock")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another run is %s: waiting for it (%s)", doing, final.name[:12])
        except OSError as error:
            raise UnwritableFileError(f"teachers.store={self.root}: cannot be written ({error.strerror})") from None
        else:
            lock.release()
        return lock

    @staticmethod
    def _remove_leftovers(final: Path) -> None:
        # Holding the lock, nobody else is building this entry: what is left was left by a killed process.
        for part in final.parent.glob(f"{final.name}.part-*"):
            log.info("removing an unfinished training of a teacher: %s", part.name)
            shutil.rmtree(part, ignore_errors=True)
        if final.is_dir() and not (final / _WEIGHTS).is_file():
            shutil.rmtree(final)  # its weights were removed


def _kept(path: Path, read: Callable[[Path], _T], instead: str | None = None) -> _T | None:
    """Reads a file that can be made again; None without it, and for a damaged one, with a warning `instead`."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (DamagedFileError, OSError) as error:
        if instead:
            log.warning("%s: %s", error, instead)
        return None


def _read_outputs(path: Path, count: int) -> Predictions:
    """Reads what `test_outputs` wrote.

    Raises:
        DamagedFileError: If it is damaged, of other images or of another teacher.
    """
    tensors = read_sealed_tensors(path)
    if read_metadata(path).get(_OF, path.stem) != path.stem:
        raise DamagedFileError(f"{path}: replaced, it belongs to another teacher or other images")
    if tensors.keys() != set(Predictions._fields) or not all(_are_outputs(part, count) for part in tensors.values()):
        raise DamagedFileError(f"{path}: damaged, does not hold a teacher's outputs for {count} images")
    return Predictions(**tensors)


def _are_outputs(part: torch.Tensor, count: int) -> bool:
    return part.ndim == 2 and len(part) == count and part.dtype == torch.float32 and not bool(part.isnan().any())
