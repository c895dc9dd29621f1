"""What two processes would send each other in every step."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from ekd_lightning.pipeline.run import run


class Keep(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        self.module = pl_module


@pytest.mark.ddp
def test_buffers_that_are_the_same_in_all_processes_are_not_broadcast(tiny_settings, tmp_path):
    keep = Keep()
    words = ("method=crd", "method.terms.crd.negatives=8", "trainer.limit_train_batches=1", "recipe.epochs=1")
    run(tiny_settings(*words), tmp_path, config={}, callbacks=[keep])
    module = keep.module
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        sent = {buffer.data_ptr() for buffer in DistributedDataParallel(module).modules_buffers}
    finally:
        distributed.destroy_process_group()
    names = {name for name, buffer in module.named_buffers() if buffer.data_ptr() in sent}
    banks = [name for name, _ in module.named_buffers() if name.endswith(".bank")]
    assert len(banks) == 2
    assert any(name.endswith("running_mean") for name in names)  # the student's statistics differ by process
    assert not [name for name in names if name.startswith("teachers.") or name in banks]
