"""Noise against its distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from ekd_lightning.evaluation.corruptions import SEVERITIES, corrupt


def noisy(name: str, severity: int, level: int) -> np.ndarray:
    """What becomes of 60 images of one grey level."""
    images = torch.full((60, 3, 32, 32), level, dtype=torch.uint8)
    return corrupt(images, name, severity).numpy().ravel().astype(float)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_moments_of_gaussian_and_speckle_noise(severity):
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    values = noisy("gaussian_noise", severity, 128) + 0.5  # cutting off takes half a level on average
    count = len(values)
    assert abs(values.mean() - 128) < 4 * 255 * scale / count**0.5
    assert values.std() == pytest.approx(255 * scale, rel=4 / (2 * count) ** 0.5 + 1e-3)
    scale = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    values = noisy("speckle_noise", severity, 100) + 0.5
    assert abs(values.mean() - 100) < 4 * 100 * scale / count**0.5
    assert values.std() == pytest.approx(100 * scale, rel=4 / (2 * count) ** 0.5 + 2e-3)
    assert (noisy("speckle_noise", severity, 0) == 0).all()


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("level", [0, 3, 90])
def test_shot_noise_is_poisson(severity, level):
    photons = (500, 250, 100, 75, 50)[severity - 1]
    values = noisy("shot_noise", severity, level)
    mean = photons * level / 255
    counts = np.arange(photons + 1)
    expected = np.bincount(
        np.floor(counts / photons * 255 + 1e-4).astype(int), stats.poisson.pmf(counts, mean), minlength=256
    )
    expected[255] += stats.poisson.sf(photons, mean)
    found = np.bincount(values.astype(int), minlength=256)
    if level == 0:
        assert found[0] == len(values)
        return
    common = expected * len(values) >= 20
    grouped = (
        np.append(found[common], found[~common].sum()),
        np.append(expected[common], expected[~common].sum()),
    )
    chi = stats.chisquare(grouped[0], grouped[1] / grouped[1].sum() * len(values))
    assert chi.pvalue > 1e-3


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_makes_salt_and_pepper(severity):
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    values = noisy("impulse_noise", severity, 77)
    assert set(np.unique(values)) == {0, 77, 255}
    for level in (0, 255):
        share = (values == level).mean()
        assert abs(share - amount / 2) < 4 * (amount / 2 / len(values)) ** 0.5
