"""The datamodule inside a real Trainer, with one process and with two."""

from types import SimpleNamespace

import pytest
import torch
from ddp_module import Recorder, make_datamodule, make_trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from ekd_lightning.data.loader import Batch, IndexBatch, TrainLoader, gather_batch
from ekd_lightning.errors import UserError


def plain_epochs(datamodule, epochs):
    """The same batches from a plain loop."""
    loader = TrainLoader(
        datamodule.dataset.train, datamodule.subset.train_index, datamodule.views, datamodule.batch_size, 3
    )
    for epoch in epochs:
        loader.set_epoch(epoch)
        for rows in loader:
            yield epoch, gather_batch(datamodule.dataset.train.images, rows, datamodule.views)


def assert_same(notes, reference):
    notes, reference = list(notes), list(reference)
    assert len(notes) == len(reference)
    for (epoch, batch), (expected_epoch, expected) in zip(notes, reference, strict=True):
        assert epoch == expected_epoch
        assert batch.soft_labels is None
        assert all(torch.equal(a, b) for a, b in zip(batch[:5], expected[:5], strict=True))


@pytest.fixture
def datamodule(random_dataset):
    return make_datamodule(random_dataset)


def test_fit_sees_each_epochs_own_order(datamodule, tmp_path):
    model = Recorder()
    make_trainer(tmp_path, 3).fit(model, datamodule=datamodule)
    assert_same(model.seen["train"], plain_epochs(datamodule, range(3)))
    first, second = (torch.cat([batch.index for epoch, batch in model.seen["train"] if epoch == n]) for n in (0, 1))
    assert not torch.equal(first, second)
    assert (datamodule.num_train_images, datamodule.num_val_images) == (88, 20)


def test_validation_images_come_untouched_from_the_training_set(datamodule, tmp_path):
    model = Recorder()
    make_trainer(tmp_path, 1).fit(model, datamodule=datamodule)
    index = torch.cat([batch.index for _, batch in model.seen["val"]])
    assert torch.equal(index, datamodule.subset.val_index)
    for _, batch in model.seen["val"]:
        assert torch.equal(batch.images, datamodule.dataset.train.images[batch.index].float() / 255)
        assert (batch.view == datamodule.views.identity_view).all()


def test_test_set_is_not_touched_before_testing(datamodule, tmp_path):
    model, trainer = Recorder(), make_trainer(tmp_path, 1)
    trainer.fit(model, datamodule=datamodule)
    assert {split for split, _ in datamodule._on_device} == {"train"}
    trainer.test(model, datamodule=datamodule, verbose=False)
    images = torch.cat([batch.images[batch.valid] for _, batch in model.seen["test"]])
    assert torch.equal(images, datamodule.dataset.test.images.float() / 255)
    assert len(images) == 33


def test_images_are_moved_once_a_device(datamodule):
    rows = next(iter(datamodule.train_dataloader()))
    meta = IndexBatch(*(field.to("meta") for field in rows[:4]))
    for batch in (rows, rows, meta, meta):
        datamodule.on_after_batch_transfer(batch, 0)
    kept = dict(datamodule._on_device)
    assert {device.type for _, device in kept} == {"cpu", "meta"}
    datamodule.on_after_batch_transfer(meta, 0)
    assert all(datamodule._on_device[key] is tensor for key, tensor in kept.items())
    # On the CPU nothing is copied at all.
    assert kept["train", torch.device("cpu")] is datamodule.dataset.train.images


def test_without_validation_split(random_dataset, tmp_path):
    datamodule, model = make_datamodule(random_dataset, val_fraction=0), Recorder()
    assert datamodule.val_dataloader() == []
    make_trainer(tmp_path, 1).fit(model, datamodule=datamodule)
    assert model.seen["train"]
    assert not model.seen["val"]


def test_without_a_trainer(datamodule):
    rows = next(iter(datamodule.train_dataloader()))
    assert isinstance(rows, IndexBatch)
    batch = datamodule.on_after_batch_transfer(rows, 0)
    assert isinstance(batch, Batch)
    assert datamodule.on_after_batch_transfer(batch, 0) is batch


def test_batch_size_that_does_not_fit_is_refused_at_once(random_dataset):
    with pytest.raises(UserError, match=r"recipe\.batch_size=512 is larger than the 88 training images"):
        make_datamodule(random_dataset, batch_size=512)


@pytest.mark.parametrize(
    "options",
    [{"save_on_train_epoch_end": True}, {"save_on_train_epoch_end": False}],
    ids=["after the epoch", "after validation"],
)
def test_resumed_run_goes_on_with_the_right_epoch(options, datamodule, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last", save_top_k=-1, every_n_epochs=1, **options)
    whole = Recorder()
    torch.manual_seed(0)
    stopped = Recorder()
    whole.load_state_dict(stopped.state_dict())
    make_trainer(tmp_path, 4).fit(whole, datamodule=datamodule)
    trainer = make_trainer(tmp_path, 2, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(stopped, datamodule=datamodule)
    resumed = Recorder()
    make_trainer(tmp_path, 4).fit(resumed, datamodule=datamodule, ckpt_path=saver.best_model_path, weights_only=False)
    assert_same(resumed.seen["train"], plain_epochs(datamodule, (2, 3)))
    assert torch.equal(resumed.linear.weight, whole.linear.weight)


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_lightning_leaves_the_loaders_alone(use_distributed_sampler, datamodule, tmp_path):
    model = Recorder()
    trainer = make_trainer(tmp_path, 1, use_distributed_sampler=use_distributed_sampler, limit_train_batches=2)
    trainer.fit(model, datamodule=datamodule)
    assert isinstance(trainer.train_dataloader, TrainLoader)
    assert len(model.seen["train"]) == 2


@pytest.mark.ddp
def test_two_processes_see_the_same_global_batches(datamodule, tmp_path):
    model = Recorder(str(tmp_path))
    make_trainer(tmp_path, 2, devices=2, strategy="ddp_spawn").fit(model, datamodule=datamodule)
    notes = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    merged = []
    for (epoch, a), (other_epoch, b) in zip(notes[0]["train"], notes[1]["train"], strict=True):
        assert epoch == other_epoch
        assert len(a.index) == 8
        merged.append((epoch, Batch(*(torch.stack(pair, 1).flatten(0, 1) for pair in zip(a[:5], b[:5], strict=True)))))
    assert_same(merged, plain_epochs(datamodule, range(2)))
    for epoch in range(2):
        valid = [
            index
            for rank in notes
            for number, batch in rank["val"]
            if number == epoch
            for index in batch.index[batch.valid].tolist()
        ]
        assert sorted(valid) == datamodule.subset.val_index.tolist()


def test_loaders_take_processes_from_the_trainer(datamodule, random_dataset):
    datamodule.trainer = SimpleNamespace(world_size=4, global_rank=3)
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader()):
        assert (loader.world_size, loader.rank) == (4, 3)
    datamodule = make_datamodule(random_dataset, batch_size=15)
    datamodule.trainer = SimpleNamespace(world_size=2, global_rank=0)
    with pytest.raises(UserError, match=r"recipe\.batch_size=15 cannot be shared evenly by 2 processes"):
        datamodule.train_dataloader()


def test_images_that_do_not_fit_on_the_device_are_sent_batch_by_batch(datamodule, monkeypatch):
    """A device that is told apart by its name only, so that this runs anywhere."""
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: moved.append(tensor.shape) or tensor)
    for free, held in ((0.0, False), (1e9, True)):
        datamodule._on_device.clear()
        moved.clear()
        monkeypatch.setattr("ekd_lightning.data.datamodule.free_bytes", lambda device, free=free: free)
        rows = next(iter(datamodule.train_dataloader()))
        batch = datamodule.gather_training(rows, torch.device("meta"))
        assert (datamodule.dataset.train.images.shape in moved) is held
        expected = gather_batch(datamodule.dataset.train.images, rows, datamodule.views)
        assert torch.equal(batch.images, expected.images)
