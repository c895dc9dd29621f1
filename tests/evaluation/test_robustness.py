"""Official files where they are present and whole, regenerated images elsewhere, and scores over either."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from corruption_references import IMAGES
from PIL import Image
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from ekd_lightning.data import ImageSet
from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.robustness import (
    EXTRA,
    FROST_FILES,
    MAIN,
    SEVERITIES,
    CorruptedSets,
    corrupt,
    mean_by_severity,
    mean_corruption_error,
    read_frost,
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
    sets = CorruptedSets(clean(), folder.parent)
    assert (sets.source, sets.names) == ("official", MAIN)
    index = torch.tensor([7, 0, 11])
    for name in ("fog", "frost"):
        whole = np.load(folder / f"{name}.npy")
        for severity in SEVERITIES:
            expected = whole[(severity - 1) * N :][:N][[7, 0, 11]].transpose(0, 3, 1, 2)
            assert np.array_equal(sets.images(name, severity, index).numpy(), expected)
    assert CorruptedSets(clean(), folder.parent, extra=True).names == (*MAIN, *EXTRA)


def test_without_the_folder_images_are_regenerated(tmp_path):
    for name in ("cifar10", "digits"):
        sets = CorruptedSets(clean(name), tmp_path, seed=3)
        assert sets.source == "regenerated"
        assert sets.names == tuple(one for one in MAIN if one != "frost")
        index = torch.tensor([5, 2])
        expected = corrupt(clean().images, "glass_blur", 4, seed=3)[index]
        assert torch.equal(sets.images("glass_blur", 4, index), expected)


def test_the_folder_of_another_data_set_is_not_taken(folder):
    assert CorruptedSets(clean("cifar100"), folder.parent).source == "regenerated"
    assert CorruptedSets(clean("digits"), folder.parent).source == "regenerated"
    folder.rename(folder.with_name("CIFAR-100-C"))
    assert CorruptedSets(clean("cifar100"), folder.parent).source == "official"
    assert CorruptedSets(clean("cifar10"), folder.parent).source == "regenerated"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "gone": (lambda path: path.unlink(), "no such file; complete the folder"),
    "cut short": (cut, "not a NumPy array, or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "not a NumPy array, or damaged"),
    "text": (lambda path: path.write_text("images"), "not a NumPy array, or damaged"),
    "objects": (
        lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
        "not a NumPy array, or damaged",
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
        CorruptedSets(clean(), folder.parent)
    assert str(caught.value).startswith(str(folder / file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_of_other_images(folder):
    np.save(folder / "labels.npy", np.tile((np.arange(N) + 1) % 3, 5).astype(np.uint8))
    with pytest.raises(UserError, match=r"labels\.npy: not the labels of the test images of cifar10"):
        CorruptedSets(clean(), folder.parent)


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
    sets = CorruptedSets(test, folder.parent, extra=True)
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


def test_photographs_are_read_at_a_fifth(tmp_path):
    assert read_frost(tmp_path / "frost") == []
    folder = tmp_path / "frost"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 175, 3), dtype=np.uint8)
    for name in FROST_FILES:
        Image.fromarray(pixels).save(folder / name.replace(".jpg", ".png"))
        (folder / name.replace(".jpg", ".png")).rename(folder / name)
    read = read_frost(folder)
    assert len(read) == 5
    # A fifth with pixel centres aligned: every fifth pixel from the third on.
    np.testing.assert_allclose(read[0].permute(1, 2, 0).numpy() * 255, pixels[2::5, 2::5], atol=1e-3)
    (folder / "frost4.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"frost4\.jpg: not an image, or damaged"):
        read_frost(folder)
    (folder / "frost2.png").unlink()
    with pytest.raises(UserError, match=r"frost2\.png: no such file; frost needs frost1\.png"):
        read_frost(folder)


def test_mistakes():
    with pytest.raises(UserError, match="unknown corruption 'fogg'; did you mean 'fog'"):
        corrupt(IMAGES, "fogg", 1)
    for severity in (0, 6):
        with pytest.raises(UserError, match=f"severity={severity} of fog"):
            corrupt(IMAGES, "fog", severity)
    with pytest.raises(UserError, match=r"frost needs the photographs frost1\.png"):
        corrupt(IMAGES, "frost", 1)
    with pytest.raises(UserError, match="not larger than the images"):
        corrupt(IMAGES, "frost", 1, frost=[torch.rand(3, 32, 80)])
    for wrong in (IMAGES.float(), IMAGES[:, :1], IMAGES[0], IMAGES[..., :30]):
        with pytest.raises(ValueError, match="uint8"):
            corrupt(wrong, "fog", 1)
