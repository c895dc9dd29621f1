"""Official files where they are present and whole, regenerated images elsewhere, and scores over either."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from ekd_lightning.data import ImageSet
from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.corruptions import EXTRA, MAIN, SEVERITIES, corrupt
from ekd_lightning.evaluation.robustness import (
    OfficialSets,
    RegeneratedSets,
    corrupted_sets,
    mean_by_severity,
    mean_corruption_error,
    score_corruptions,
    spread_index,
)

N = 12


def clean(name: str = "cifar10") -> ImageSet:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (N, 3, 32, 32), dtype=np.uint8))
    return ImageSet(name, "test", images, torch.arange(N) % 3, ("a", "b", "c"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in the form of the official one, with N images a block."""
    place = tmp_path / "CIFAR-10-C"
    place.mkdir()
    rng = np.random.default_rng(1)
    for name in (*MAIN, *EXTRA):
        np.save(place / f"{name}.npy", rng.integers(0, 256, (5 * N, 32, 32, 3), dtype=np.uint8))
    np.save(place / "labels.npy", np.tile(np.arange(N) % 3, 5).astype(np.uint8))
    return place


def test_official_files_are_read_block_by_block(folder):
    sets = corrupted_sets(clean(), folder.parent)
    assert isinstance(sets, OfficialSets)
    assert (sets.source, sets.names) == ("official", MAIN)
    index = torch.tensor([7, 0, 11])
    for name in ("fog", "frost"):
        whole = np.load(folder / f"{name}.npy")
        for severity in SEVERITIES:
            expected = whole[(severity - 1) * N :][:N][[7, 0, 11]].transpose(0, 3, 1, 2)
            assert np.array_equal(sets.images(name, severity, index).numpy(), expected)
    assert corrupted_sets(clean(), folder.parent, extra=True).names == (*MAIN, *EXTRA)


def test_without_the_folder_images_are_regenerated(tmp_path):
    for name in ("cifar10", "digits"):
        sets = corrupted_sets(clean(name), tmp_path, seed=3)
        assert isinstance(sets, RegeneratedSets)
        assert sets.source == "regenerated"
        assert sets.names == tuple(one for one in MAIN if one != "frost")
        index = torch.tensor([5, 2])
        expected = corrupt(clean().images, "glass_blur", 4, seed=3)[index]
        assert torch.equal(sets.images("glass_blur", 4, index), expected)


def test_the_folder_of_another_data_set_is_not_taken(folder):
    assert corrupted_sets(clean("cifar100"), folder.parent).source == "regenerated"
    assert corrupted_sets(clean("digits"), folder.parent).source == "regenerated"
    folder.rename(folder.with_name("CIFAR-100-C"))
    assert corrupted_sets(clean("cifar100"), folder.parent).source == "official"
    assert corrupted_sets(clean("cifar10"), folder.parent).source == "regenerated"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "gone": (lambda path: path.unlink(), "no such file; complete the folder"),
    "cut short": (cut, "not an array of NumPy, or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "not an array of NumPy, or damaged"),
    "text": (lambda path: path.write_text("images"), "not an array of NumPy, or damaged"),
    "objects": (
        lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
        "not an array of NumPy, or damaged",
    ),
    "floats": (lambda path: np.save(path, np.load(path).astype(np.float32)), "holds float32"),
    "too few": (lambda path: np.save(path, np.load(path)[:-1]), "instead of uint8"),
    "several arrays": (lambda path: np.savez(path.open("wb"), a=np.zeros(3)), "holds several arrays"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["snow.npy", "labels.npy"])
def test_damaged_files_are_named(folder, damage, file):
    change, message = DAMAGES[damage]
    change(folder / file)
    with pytest.raises(UserError) as caught:
        corrupted_sets(clean(), folder.parent)
    assert str(caught.value).startswith(str(folder / file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_of_other_images(folder):
    np.save(folder / "labels.npy", np.tile((np.arange(N) + 1) % 3, 5).astype(np.uint8))
    with pytest.raises(UserError, match=r"labels\.npy: not the labels of the test images of cifar10"):
        corrupted_sets(clean(), folder.parent)


def test_spread_index():
    assert spread_index(5, None).tolist() == spread_index(5, 9).tolist() == [0, 1, 2, 3, 4]
    for count, most in ((10, 3), (10_000, 2000), (7, 6)):
        index = spread_index(count, most)
        assert len(index) == most
        assert (index.diff() >= count // most).all()
        assert index.max() < count


class Colours(nn.Module):
    """Classifies by the mean of each channel."""

    def forward(self, images):
        return 8 * images.mean((-2, -1))


def test_scores_of_official_files_by_sklearn(folder):
    test, index = clean(), torch.tensor([0, 2, 3, 5, 7, 8, 11])
    sets = corrupted_sets(test, folder.parent, extra=True)
    found = score_corruptions(Colours(), sets, test, index, batch_size=3)
    assert list(found) == [*MAIN, *EXTRA]
    labels = test.labels[index].numpy()
    accuracies = np.zeros((len(MAIN), 5))
    for row, name in enumerate(MAIN):
        blocks = np.load(folder / f"{name}.npy").reshape(5, N, 32, 32, 3)[:, index.numpy()]
        for severity, block in enumerate(blocks):
            logits = 8 * (block / 255).mean((1, 2))
            accuracies[row, severity] = accuracy_score(labels, logits.argmax(1))
            assert found[name]["accuracy"][severity] == pytest.approx(accuracies[row, severity])
            probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            expected = log_loss(labels, probs, labels=[0, 1, 2])
            assert found[name]["nll"][severity] == pytest.approx(expected, rel=1e-5)
    assert mean_by_severity(found, "accuracy") == pytest.approx(accuracies.mean(0).tolist())
    assert mean_corruption_error(found) == pytest.approx(1 - accuracies.mean())
    found["saturate"]["accuracy"] = [0.0] * 5  # an extra one, in no mean
    assert mean_corruption_error(found) == pytest.approx(1 - accuracies.mean())
