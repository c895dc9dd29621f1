"""Store of trained teachers for all runs: a folder with an entry per teacher, named by the hash of its key."""

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

_FORMAT = 1  # to be raised when training changes so much that older teachers must not be reused
_WEIGHTS = "teacher.safetensors"
_KEY = "key.json"
_STORE_KEY = "store_key"  # metadata of a file: the entry that it belongs to, to detect a copied file
COST = "cost.json"
"""File that a training may write to its scratch folder: its cost, which is kept beside the weights."""


class TeacherStore:
    """A content-addressed folder of trained teachers and of their outputs for test sets; it is made when needed.

    An entry appears by one rename once it is complete; a killed training leaves only a scratch folder, from which the
    next one continues. Each entry has a lock, so that concurrent runs wait for each other and train a teacher once.

    Raises:
        UserError: On use, if the folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def digest(key: Mapping[str, Any]) -> str:
        """Returns the SHA-256 of a key, in hex; the order of its items does not matter."""
        text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, key: Mapping[str, Any]) -> Path:
        """Returns the path of the weights of `key`, whether they exist or not."""
        return self.weights(self.digest(key))

    def weights(self, digest: str) -> Path:
        """Returns the path of the weights of the entry with this digest, whether they exist or not."""
        return self.root / "teachers" / digest / _WEIGHTS

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether the teacher of `key` is stored; raises UnwritableFileError if it is not, and cannot be."""
        if self.path(key).is_file():
            return True
        self._lock(self.path(key).parent, "trains this teacher")
        return False

    def cost(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the recorded cost of training `key`; empty if there is none."""
        return _kept(self.path(key).with_name(COST), read_json, "the cost of its training is unknown") or {}

    def get_or_train(self, key: Mapping[str, Any], train: Callable[[Path], StagedNetwork]) -> StagedNetwork:
        """Loads the teacher of `key`, training it first when the store lacks it.

        Args:
            key: Everything that determines the teacher, JSON-able.
            train: Trains the teacher, given the path of a scratch folder. The folder is deleted afterwards, but kept if
                the training fails or is killed, so that the next one finds its checkpoints.

        Raises:
            UserError: If the stored weights are damaged. They are not replaced without the user's consent: training is
                expensive, and runs that learned from them record their hash.
        """
        final = self.path(key).parent
        if not (final / _WEIGHTS).is_file():  # reading needs no lock: a shared store may be read-only
            with self._lock(final, "trains this teacher"):
                self._remove_leftovers(final)
                if not (final / _WEIGHTS).is_file():
                    self._train(final, key, train)
        path = final / _WEIGHTS
        try:
            network = load_network(path)
            if read_metadata(path).get(_STORE_KEY, final.name) != final.name:
                raise DamagedFileError(f"{path}: replaced by a file from another folder of the store")
        except UserError as error:
            raise UserError(f"{error}; delete the folder {final} to train this teacher again") from None
        return network

    @staticmethod
    def _train(final: Path, key: Mapping[str, Any], train: Callable[[Path], StagedNetwork]) -> None:
        run, ready = (final.with_name(f"{final.name}.{suffix}") for suffix in ("resume", "part-ready"))
        network = train(run)
        try:
            save_network(ready / _WEIGHTS, network, {"data": str(key.get("data", "")), _STORE_KEY: final.name})
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
        """Returns a teacher's outputs for a test set, float32 on the CPU; computed once per teacher and test set.

        They are stored if possible, under the teacher's `answers_sha256`. If they are, `network` is not called.
        """
        digest = self.digest({"teacher": sha256, "images": images.sha256})
        path = self.root / "outputs" / f"{digest}.safetensors"
        read = partial(_read_outputs, count=len(images))
        found = _kept(path, read)  # without a lock: a shared store may be read-only
        if found is not None:
            return found
        with self._lock_or_none(path, "computes this teacher's outputs for the test set"):
            found = _kept(path, read, "its outputs are computed again")
            if found is None:
                found = predict(network().to(device), images, batch_size=batch_size, device=device)
                try:
                    write_sealed_tensors(path, found._asdict(), {_STORE_KEY: path.stem})
                except UnwritableFileError as error:
                    log.warning("%s: this teacher's outputs for the test set are not stored", error)
        return found

    def _lock_or_none(self, path: Path, doing: str) -> contextlib.AbstractContextManager[object]:
        try:
            return self._lock(path, doing)
        except UnwritableFileError:  # the write below reports it
            return contextlib.nullcontext()

    def _lock(self, final: Path, doing: str) -> FileLock:
        lock = FileLock(f"{final}.lock")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another run, which %s (%s)", doing, final.name[:12])
        except OSError as error:
            raise UnwritableFileError(f"teachers.store={self.root}: cannot be written ({error.strerror})") from None
        else:
            lock.release()
        return lock

    @staticmethod
    def _remove_leftovers(final: Path) -> None:
        # Under the lock nobody else builds this entry, so these files are of a killed process.
        for part in final.parent.glob(f"{final.name}.part-*"):
            log.info("removing the incomplete entry %s, which a killed run left", part)
            shutil.rmtree(part, ignore_errors=True)
        if final.is_dir() and not (final / _WEIGHTS).is_file():
            shutil.rmtree(final)  # its weights were removed


def _kept(path: Path, read: Callable[[Path], _T], instead: str | None = None) -> _T | None:
    """Reads a file that can be made again; None if it is missing, or damaged, with a warning that ends in `instead`."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (DamagedFileError, OSError) as error:
        if instead:
            log.warning("%s: %s", error, instead)
        return None


def _read_outputs(path: Path, count: int) -> Predictions:
    """Reads what `test_outputs` wrote; raises DamagedFileError if it is damaged or that of another teacher or set."""
    tensors = read_sealed_tensors(path)
    if read_metadata(path).get(_STORE_KEY, path.stem) != path.stem:
        raise DamagedFileError(f"{path}: replaced by a file of another teacher or other images")
    if tensors.keys() != set(Predictions._fields) or not all(_are_outputs(part, count) for part in tensors.values()):
        raise DamagedFileError(f"{path}: damaged, does not hold the outputs of a teacher for {count} images")
    return Predictions(**tensors)


def _are_outputs(part: torch.Tensor, count: int) -> bool:
    return part.ndim == 2 and len(part) == count and part.dtype == torch.float32 and not bool(part.isnan().any())
