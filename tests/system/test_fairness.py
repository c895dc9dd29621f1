"""At one seed all methods get the same images, order, views, initial weights and number of steps."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import ekd_lightning.conf
from ekd_lightning.data.loader import TrainLoader
from ekd_lightning.networks import state_sha256
from ekd_lightning.pipeline.prepare import prepare

CONF = Path(next(iter(ekd_lightning.conf.__path__)))
METHODS = sorted(path.stem for path in CONF.glob("method/*.yaml"))
PLAIN = ("ce", "kd_mean")
BRANCHED = ("branched_ce", "ekd", "ekd_mean", "ekd_permuted", "ekd_random", "ekd_smd")


@pytest.fixture(scope="module")
def prepared(tiny_settings):
    """(method, seed) -> its settings and checked parts."""
    made = {}

    def get(method, seed=0):
        if (method, seed) not in made:
            fits = ("method.teacher=first",) if method in ("fsp", "simkd") else ()  # the other has more channels
            settings = tiny_settings(f"method={method}", f"seed={seed}", *fits)
            made[method, seed] = settings, prepare(settings, "cpu")
        return made[method, seed]

    return get


def rows_sha256(parts, epochs=(0, 1)) -> str:
    """Hash of (index, view) of every batch of these epochs, in order."""
    data = parts[1].datamodule
    digest = hashlib.sha256()
    for epoch in epochs:
        loader = data.train_dataloader()
        assert isinstance(loader, TrainLoader)
        loader.set_epoch(epoch)
        for batch in loader:
            digest.update(batch.index.numpy().tobytes() + batch.view.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_sees_the_same_images_in_the_same_order_and_views(prepared, method):
    (_, ours), (_, theirs) = prepared(method), prepared("ce")
    assert ours.subset.sha256 == theirs.subset.sha256
    assert torch.equal(ours.subset.train_index, theirs.subset.train_index)
    assert torch.equal(ours.subset.val_index, theirs.subset.val_index)
    assert ours.views.key == theirs.views.key
    assert rows_sha256(prepared(method)) == rows_sha256(prepared("ce"))


def test_another_seed_has_another_order_of_the_same_images(prepared):
    assert rows_sha256(prepared("ce", 1)) != rows_sha256(prepared("ce", 0))
    assert prepared("ce", 1)[1].subset.sha256 == prepared("ce", 0)[1].subset.sha256


def test_epochs_differ(prepared):
    assert rows_sha256(prepared("ce"), (0,)) != rows_sha256(prepared("ce"), (1,))


def test_equal_students_of_all_methods_start_with_the_same_weights(prepared):
    found = {}
    for method in METHODS:
        settings, parts = prepared(method)
        student = settings.student
        kind = (student.branches, student.split_after, student.ensemble == "gate", student.reuse_classifier)
        found.setdefault(kind, {})[method] = state_sha256(parts.student)
    for kind, hashes in found.items():
        assert len(set(hashes.values())) == 1, (kind, hashes)
    assert len(found[1, "none", False, False]) >= 20
    assert found[3, "stage3", False, False].keys() >= set(BRANCHED)


@pytest.mark.parametrize("family", [PLAIN, BRANCHED])
def test_the_same_student_starts_with_the_same_weights_whatever_the_method(prepared, family):
    for seed in (0, 1):
        assert len({state_sha256(prepared(method, seed)[1].student) for method in family}) == 1
    assert state_sha256(prepared(family[0], 0)[1].student) != state_sha256(prepared(family[0], 1)[1].student)


def test_a_plain_student_starts_as_the_first_branch_does(prepared):
    plain, branched = (prepared(method)[1].student for method in ("ce", "ekd_pooled"))
    theirs = {**branched.branches[0].state_dict(prefix="stages."), **branched.trunk.state_dict(prefix="trunk.")}
    for name, value in plain.branches[0].head.state_dict().items():
        assert torch.equal(value, theirs[f"stages.head.{name}"])
    for name, value in plain.branches[0].stages["stage3"].state_dict().items():
        assert torch.equal(value, theirs[f"stages.stages.stage3.{name}"])


def test_every_method_takes_the_same_steps(prepared):
    counts = set()
    for method in METHODS:
        settings, ready = prepared(method)
        counts.add((settings.recipe.epochs, len(ready.datamodule.train_dataloader())))
    assert len(counts) == 1


def test_finished_runs_say_so(train, tmp_path):
    results = [train(tmp_path / method, f"method={method}").result for method in ("ce", "kd_mean", "ekd")]
    for field in ("steps", "epochs_done", "batch_size", "subset_sha256", "views", "num_train_images"):
        assert len({result[field] for result in results}) == 1, field
