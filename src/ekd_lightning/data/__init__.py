"""Data: images in memory, subsets, views and batches; the LightningDataModule is in `data.datamodule`."""

from ekd_lightning.data.augmentations import Augmentation, augmentation_names, register_augmentation
from ekd_lightning.data.catalog import dataset_names, load_dataset, open_dataset, open_unlabelled, register_dataset
from ekd_lightning.data.download import obtain
from ekd_lightning.data.images import Dataset, ImageSet, Unlabelled
from ekd_lightning.data.loader import Batch, EvalLoader, IndexBatch, TrainLoader, gather_batch
from ekd_lightning.data.mixing import Mix, Mixing
from ekd_lightning.data.order import Draws, epoch_order, epoch_views, hash_uniform_u64
from ekd_lightning.data.subset import Subset, choose_subset
from ekd_lightning.data.views import CropFlip, Identity, Pool, ViewFamily, make_views

__all__ = [
    "Augmentation",
    "Batch",
    "CropFlip",
    "Dataset",
    "Draws",
    "EvalLoader",
    "Identity",
    "ImageSet",
    "IndexBatch",
    "Mix",
    "Mixing",
    "Pool",
    "Subset",
    "TrainLoader",
    "Unlabelled",
    "ViewFamily",
    "augmentation_names",
    "choose_subset",
    "dataset_names",
    "epoch_order",
    "epoch_views",
    "gather_batch",
    "hash_uniform_u64",
    "load_dataset",
    "make_views",
    "obtain",
    "open_dataset",
    "open_unlabelled",
    "register_augmentation",
    "register_dataset",
]
