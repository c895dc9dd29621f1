"""Data: images in memory, subsets, views and batches; the LightningDataModule is in `data.datamodule`."""

from ekd_lightning.data.augmentations import register_augmentation
from ekd_lightning.data.catalog import load_dataset, open_dataset, open_unlabelled, register_dataset
from ekd_lightning.data.images import Dataset, ImageSet, Unlabelled
from ekd_lightning.data.loader import Batch
from ekd_lightning.data.mixing import Mixing
from ekd_lightning.data.order import Draws
from ekd_lightning.data.subset import Subset, choose_subset
from ekd_lightning.data.views import ViewFamily, make_views

__all__ = [
    "Batch",
    "Dataset",
    "Draws",
    "ImageSet",
    "Mixing",
    "Subset",
    "Unlabelled",
    "ViewFamily",
    "choose_subset",
    "load_dataset",
    "make_views",
    "open_dataset",
    "open_unlabelled",
    "register_augmentation",
    "register_dataset",
]
