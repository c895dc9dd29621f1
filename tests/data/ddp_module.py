"""What the datamodule tests train, importable by spawned processes."""

import pytorch_lightning as pl
import torch

from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.data.images import Dataset
from ekd_lightning.data.loader import Batch
from ekd_lightning.data.subset import choose_subset
from ekd_lightning.data.views import CropFlip


def make_datamodule(dataset: Dataset, val_fraction: float = 0.2, batch_size: int = 16) -> ImageDataModule:
    subset = choose_subset(dataset.train.labels, fraction=0.9, val_fraction=val_fraction)
    return ImageDataModule(dataset, subset, CropFlip(1), batch_size=batch_size, eval_batch_size=10, seed=3)


class Recorder(pl.LightningModule):
    """A linear classifier that notes every batch; with a folder, each process saves its notes there."""

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3 * 8 * 8, 4)
        self.folder = folder
        self.seen: dict[str, list[tuple[int, Batch]]] = {"train": [], "val": [], "test": []}

    def note(self, kind: str, batch: Batch) -> torch.Tensor:
        assert isinstance(batch, Batch)
        if not self.trainer.sanity_checking:
            self.seen[kind].append((self.current_epoch, batch))
        return torch.nn.functional.cross_entropy(self.linear(batch.images.flatten(1)), batch.labels)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.note("train", batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.note("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.note("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self) -> None:
        if self.folder:
            torch.save(self.seen, f"{self.folder}/rank{self.global_rank}.pt")


def make_trainer(folder, epochs: int = 2, **options) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=str(folder),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "devices": 1, **options},
    )
