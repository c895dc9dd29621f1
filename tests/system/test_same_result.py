"""Each way to be fast, switched on or off alone: the same batches, and the same losses within rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torchvision.transforms import functional

from ekd_lightning.data.loader import TrainLoader, gather_batch
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.pipeline.run import make_distiller
from ekd_lightning.settings import Settings
from ekd_lightning.training.pool import gather_teachers

PLAIN = (
    "teachers.table=off",
    "teachers.precision=float32",
    "teachers.fold=false",
    "teachers.compile=never",
    "channels_last=false",
    "student.compile=never",
    # A small total: at the default 100 the first steps are so long that rounding grows tenfold within three of them.
    "method.terms.feature_branch.weight=1",
)
SWITCHES = [
    # what is switched, and the largest relative difference of a loss in the first steps
    ("teachers.table=auto", 2e-3),  # rows are float16
    ("teachers.fold=true", 1e-4),
    ("channels_last=true", 1e-4),
    ("teachers.precision=bfloat16", 3e-2),
    pytest.param("teachers.compile=always", 1e-4, marks=pytest.mark.slow),
    pytest.param("student.compile=always", 1e-3, marks=pytest.mark.slow),
]


def first_steps(settings: Settings, folder) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Every logged value of the first three steps [steps, values], and their index, view and images."""
    prepared = prepare(replace(settings, teachers=replace(settings.teachers)), "cpu")
    module = make_distiller(settings, prepared, gather_teachers(prepared.teachers))
    seen: list[torch.Tensor] = []
    genuine = module.losses

    def losses(batch, values=None):
        seen.extend((batch.index, batch.view, batch.images))
        return genuine(batch, values)

    module.losses = losses
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=prepared.datamodule)
    return torch.stack(module._step_log._rows), seen


@pytest.fixture(scope="module")
def plain(tiny_settings, tmp_path_factory):
    return first_steps(tiny_settings(*PLAIN), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(("switch", "tolerance"), SWITCHES)
def test_one_switch_changes_the_cost_only(tiny_settings, plain, tmp_path, switch, tolerance):
    values, seen = first_steps(tiny_settings(*PLAIN, switch), tmp_path)
    expected, expected_seen = plain
    assert len(seen) == len(expected_seen) == 9
    assert all(torch.equal(one, other) for one, other in zip(seen, expected_seen, strict=True))
    losses, wanted = values[:, :-1], expected[:, :-1]  # the last value is the accuracy
    assert ((losses - wanted).abs() <= tolerance * wanted.abs() + 1e-6).all(), (losses - wanted) / wanted


def test_batches_are_those_of_torchvision_one_image_at_a_time(tiny_settings):
    """The loader in memory against what a DataLoader with torchvision's functions would make of the same draws."""
    prepared = prepare(tiny_settings(), "cpu")
    images, padding, P = prepared.dataset.train.images, 2, 5
    loader = TrainLoader(prepared.dataset.train, prepared.subset.train_index, prepared.views, 32, seed=3)
    loader.set_epoch(4)
    for rows in loader:
        batch = gather_batch(images, rows, prepared.views)
        for image, index, view in zip(batch.images, rows.index, rows.view, strict=True):
            top, left = divmod(int(view), P)
            padded = functional.pad(images[index], [padding])
            expected = functional.convert_image_dtype(functional.crop(padded, top, left, 32, 32), torch.float32)
            assert torch.equal(image, expected)
        assert torch.equal(batch.labels, prepared.dataset.train.labels[rows.index])
