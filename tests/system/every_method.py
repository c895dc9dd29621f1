"""Runs methods one after the other on a few real images; started by test_every_method.py, once per process.

python every_method.py FOLDER STORE DEVICES METHOD...
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import sys
import traceback
import warnings
from pathlib import Path

WORDS = (
    "experiment=cifar10_limited",
    "data.fraction=null",
    "data.per_class=16",
    "data.val_fraction=0.25",
    "data.eval_batch_size=50",
    "recipe.epochs=2",
    "recipe.batch_size=40",
    "teachers.pool=[cifar10_resnet20_akamaster, cifar10_resnet20_chenyaofo]",
    "teachers.count=2",
    "teachers.compile=never",
    "student.compile=never",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.limit_test_batches=2",
)
"""120 training and 40 validation images of CIFAR-10, 6 steps, two pretrained teachers, ResNet-8 students."""


def run_all(folder: Path, store: Path, devices: int, methods: list[str], rank: int = 0) -> dict[str, str]:
    """Trains every method; returns the error of each, "" for those that succeeded."""
    from ekd_lightning.config.config import compose_settings
    from ekd_lightning.config.edge import quiet_libraries
    from ekd_lightning.pipeline.run import run

    quiet_libraries()
    errors = {}
    for name in methods:
        own = [f"method={name}", f"trainer.devices={devices}", f"teachers.store={store}"]
        if devices > 1:
            own += ["trainer.strategy=ddp"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = run(compose_settings(*WORDS, *own), folder / name)
            (folder / name / f"rank{rank}.json").write_text(json.dumps(dict(result)))
            errors[name] = ""
        except Exception as error:
            traceback.print_exc()
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def main() -> None:
    import os

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    from ekd_lightning.pipeline import run  # noqa: F401

    gc.freeze()  # else each run looks through all objects of the libraries
    folder, store, devices, *methods = sys.argv[1:]
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    errors = run_all(Path(folder), Path(store), int(devices), methods, rank)
    (Path(folder) / f"errors{rank}.json").write_text(json.dumps(errors))
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()
    sys.exit(1 if any(errors.values()) else 0)


if __name__ == "__main__":
    main()
