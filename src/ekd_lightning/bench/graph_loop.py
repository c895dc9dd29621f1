"""Loop of recorded training steps without Lightning: what the step itself allows."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ekd_lightning.bench.ours import BareLoop, Job
from ekd_lightning.bench.timing import seconds_of
from ekd_lightning.data.loader import Batch, gather_batch
from ekd_lightning.training.recorded_step import EpochRows, RecordedStep, StepValues


class GraphLoop:
    """The first epoch of a job, again and again: on CUDA one graph a step, elsewhere the same step as it is.

    Args:
        job: What to train; the weights of its terms and its assignment must be the same in all steps.
    """

    def __init__(self, job: Job) -> None:
        self._bare = bare = BareLoop(job)
        self._device, self._batch_size = job.device, job.settings.recipe.batch_size
        self._half = job.settings.trainer.get("precision") == "bf16-mixed"
        self._step = RecordedStep(
            device=job.device,
            optimizer=bare.optimizer,
            gather=partial(gather_batch, bare.images, views=bare.prepared.views),
            loss=self._loss,
            weight_names=tuple(bare.method.terms),
        )
        bare.student.train()
        bare.loader.set_epoch(0)
        images_of = partial(bare.prepared.datamodule.training_images, device=job.device)
        labels, index, view = bare.loader.epoch()
        bare.source.prepare_epoch(index.flatten(), view.flatten(), images_of, {(): index.numel()})
        weights = bare.method.weights_at(0.0)
        row = torch.tensor([weights[name] for name in bare.method.terms])
        self._step.start_epoch(EpochRows(labels, index, view, row.expand(len(index), -1).contiguous()), 1)
        self._steps, self._done = len(index), 0

    @property
    def student(self) -> torch.nn.Module:
        """What is trained."""
        return self._bare.student

    @property
    def num_graphs(self) -> int:
        """Recorded graphs; 0 where none can be, or before the warm-up is over."""
        return self._step.num_graphs

    def _loss(self, batch: Batch, values: StepValues) -> tuple[Tensor, list[Tensor]]:
        bare = self._bare
        batch = batch._replace(images=batch.images.contiguous(memory_format=bare.memory_format))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half, cache_enabled=False):
            taught = bare.source.ask(batch)
            result = bare.method(bare.forward(batch.images), taught, batch, weights=values.weights, step_t=values.step)
        return result.total, [result.total]

    def run(self, steps: int) -> None:
        """Goes on by so many steps."""
        for _ in range(steps):
            self._step.run(self._done % self._steps, self._done, "all terms")
            self._bare.schedule.step()
            self._done += 1

    def images_per_second(self, steps: int) -> float:
        """The rate over some steps."""
        return steps * self._batch_size / seconds_of(partial(self.run, steps), self._device)
