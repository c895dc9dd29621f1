"""Loop of whole training steps as one CUDA graph, without Lightning: what the step itself allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ekd_lightning.bench.ours import BareLoop, Job
from ekd_lightning.bench.timing import seconds_of
from ekd_lightning.data.loader import IndexBatch, gather_batch
from ekd_lightning.networks.outputs import TeacherOutput
from ekd_lightning.training.schedule import lr_factor

_WARM_UP = 5


class GraphLoop:
    """Gathering, student, losses, backward pass, optimiser and log as one graph over buffers that stay.

    The rows of all epochs, teachers' answers included, are on the device before the first step. Without a graph (on
    a processor) the same step runs as it is.

    Args:
        job: What to train; its method may ask for logits and pooled features. `student.compile=always` compiles.
        epochs: Whose rows are read; the table should hold them.
    """

    def __init__(self, job: Job, epochs: int = 1) -> None:
        self._loop = loop = BareLoop(job)
        self._device, settings = job.device, job.settings
        self._batch_size = settings.recipe.batch_size
        self._half = settings.trainer.get("precision") == "bf16-mixed"
        self._read_rows(epochs)
        factor = lr_factor(settings.recipe, len(loop.loader))
        rates = [settings.recipe.lr * factor(step) for step in range(self.steps)]
        self._rates = torch.tensor(rates, device=self._device)
        self._lr = torch.tensor(settings.recipe.lr, device=self._device)
        self._parameters = [*loop.student.parameters(), *loop.method.parameters()]
        self._optimizer = torch.optim.SGD(
            self._parameters,
            lr=self._lr,
            momentum=settings.recipe.momentum,
            nesterov=settings.recipe.nesterov,
            weight_decay=settings.recipe.weight_decay,
            fused=True,
        )
        self._at = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.losses = torch.zeros(self.steps, device=self._device)
        loop.student.train()
        self._go = self._captured() if self._device.type == "cuda" else self._step

    @property
    def student(self) -> torch.nn.Module:
        """What is trained."""
        return self._loop.student

    def _read_rows(self, epochs: int) -> None:
        """Puts index, view, labels and teachers' answers of every step on the device: [S, B, ...]."""
        loop, rows, taught = self._loop, [], []
        gather = partial(loop.prepared.datamodule.training_images, device=self._device)
        for epoch in range(epochs):
            loop.loader.sampler.set_epoch(epoch)
            index, view = loop.loader.rows()
            loop.source.prepare_epoch(index, view, gather, {(): len(index)})
            for row in loop.loader:
                rows.append(row)
                taught.append(loop.source.ask(gather_batch(loop.images, row, loop.prepared.views)))
        self.steps = len(rows)
        self._index, self._view, self._labels, self._valid = (
            torch.stack([getattr(row, name) for row in rows]).to(self._device)
            for name in ("index", "view", "labels", "valid")
        )
        self._logits = torch.stack([answer.logits for answer in taught])
        self._pooled = [
            torch.stack(parts) for parts in zip(*(answer.pooled for answer in taught), strict=True)
        ]

    def _step(self) -> None:
        """One step, at the place that the counter on the device says."""
        loop = self._loop

        def now(values: Tensor) -> Tensor:
            return values.index_select(0, self._at).squeeze(0)

        rows = IndexBatch(now(self._labels), now(self._index), now(self._view), now(self._valid))
        batch = gather_batch(loop.images, rows, loop.prepared.views)
        batch = batch._replace(images=batch.images.contiguous(memory_format=loop.memory_format))
        taught = TeacherOutput(now(self._logits), tuple(now(pooled) for pooled in self._pooled), ())
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half, cache_enabled=False):
            result = loop.method(loop.forward(batch.images), taught, batch)
        self._optimizer.zero_grad(set_to_none=True)
        result.total.backward()
        self._lr.copy_(now(self._rates))
        self._optimizer.step()
        self.losses.index_copy_(0, self._at, result.total.detach().float().view(1))
        self._at.add_(1).remainder_(self.steps)

    def _captured(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def run(self, steps: int) -> None:
        """Goes on by so many steps."""
        for _ in range(steps):
            self._go()

    def images_per_second(self, steps: int) -> float:
        """The rate over some steps."""
        return steps * self._batch_size / seconds_of(partial(self.run, steps), self._device)
