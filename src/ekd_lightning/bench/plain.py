"""Plain loops, as a user would write them without this package: torchvision transforms in workers, live teachers.

To be fair, images are already in memory, teachers run under `no_grad`, workers persist, and the best number of workers
is used. `PlainLoop` computes in float32 without further settings, `CarefulLoop` uses PyTorch's options for speed.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ekd_lightning.bench import seconds_of
from ekd_lightning.bench.ours import Job
from ekd_lightning.data import ImageSet
from ekd_lightning.data.loader import Batch, check_batch_size
from ekd_lightning.networks.frozen import NetworkAccess
from ekd_lightning.networks.staged import NetworkOutput, StagedNetwork, StudentOutput, TeacherOutput


class PilImages(Dataset[tuple[Tensor, int]]):
    """Images as `torchvision.datasets.CIFAR10` returns them: NumPy to PIL to transforms to tensor."""

    def __init__(self, image_set: ImageSet, index: Tensor) -> None:
        self._images = image_set.images[index].permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = image_set.labels[index].tolist()
        side = self._images.shape[1]
        self._transform = transforms.Compose(
            [transforms.RandomCrop(side, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image = Image.fromarray(np.asarray(self._images[position]))
        return self._transform(image), self._labels[position]


def plain_loader(
    image_set: ImageSet, index: Tensor, batch_size: int, workers: int, *, pin: bool = False
) -> DataLoader[tuple[Tensor, int]]:
    """Shuffled batches by PIL transforms; `pin` puts them into pinned memory, from which copies are asynchronous.

    Raises:
        UserError: If a batch is larger than the set; with unlabelled images, a run may have such batches.
    """
    check_batch_size(batch_size, len(index))
    return DataLoader(
        PilImages(image_set, index),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
    )


class _PlainNetworks(NetworkAccess):
    """Access to the networks for terms; the teachers are not frozen forms."""

    def teacher_outputs(self, m: int, images: Tensor) -> NetworkOutput:
        return self._members[m].outputs(images)


class PlainLoop:
    """Trains a student under live teachers in float32, with SGD and the same loss as in this package's loops."""

    memory_format = torch.preserve_format
    pinned = False
    """Whether batches are in pinned memory."""

    def __init__(self, job: Job, workers: int) -> None:
        prepared, self.device = job.prepared(), job.device
        self.loader = plain_loader(
            prepared.dataset.train,
            prepared.subset.train_index,
            job.settings.recipe.batch_size,
            workers,
            pin=self.pinned and job.device.type == "cuda",
        )
        self.student, self.method = prepared.student.to(job.device), prepared.method.to(job.device)
        self.teachers = job.teachers.to(job.device)
        self.networks = _PlainNetworks(self.student, self.teachers)
        parameters = [*self.student.parameters(), *self.method.parameters()]
        self.optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self._batches = self._endless()

    def _endless(self) -> Generator[list[Tensor], None, None]:
        while True:
            yield from self.loader

    def next_batch(self) -> Batch:
        """The loader's next batch, on the device."""
        images, labels = next(self._batches)
        images = images.to(self.device, non_blocking=self.pinned, memory_format=self.memory_format)
        labels = labels.to(self.device, non_blocking=self.pinned)
        nothing = torch.zeros_like(labels)
        return Batch(images, labels, nothing, nothing, nothing.bool())

    def loss(self, batch: Batch) -> Tensor:
        """The total loss of the method for a batch; teachers also return the stages that it reads."""
        teachers = self.teachers(batch.images, self.method.teacher_stages)
        student = self.student.outputs(batch.images, self.method.student_stages)
        return self._total(student, teachers, batch)

    def _total(self, student: StudentOutput, teachers: TeacherOutput, batch: Batch) -> Tensor:
        # The middle of the training, where terms that start late or end early are active.
        return self.method(student, teachers, batch, progress=0.5, networks=self.networks).total

    def step(self) -> None:
        """One training step."""
        loss = self.loss(self.next_batch())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def started(self) -> float:
        """Runs the first steps; returns the seconds of the first one, which starts workers and compiles."""
        seconds = seconds_of(self.step, self.device)
        for _ in range(2 * self.loader.num_workers):  # uses up prefetched batches, which would count as speed
            self.step()
        return seconds

    def images_per_second(self, steps: int) -> float:
        """The rate over some steps, the loader included."""
        self.teachers.to(self.device)  # Lightning moves them off the device at the end of its own training

        def work() -> None:
            for _ in range(steps):
                self.step()

        seconds = seconds_of(work, self.device)
        return steps * int(self.loader.batch_size or 1) / seconds

    def close(self) -> None:
        """Ends the loader's workers now, because the garbage collector might do so during another measurement."""
        self._batches.close()
        iterator = self.loader._iterator
        self.loader._iterator = None
        if iterator is not None and self.loader.num_workers:
            # Dropping the iterator is not enough: it may have other references, and does not wait for its workers.
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            for worker in iterator._workers:  # type: ignore[attr-defined]
                worker.join()


class CarefulLoop(PlainLoop):
    """The same loop as a careful user writes it: channels-last, autocast to bfloat16, torch.compile, pinned batches."""

    memory_format = torch.channels_last
    pinned = True

    def __init__(self, job: Job, workers: int, mode: str = "default") -> None:
        super().__init__(replace(job, teachers=copy.deepcopy(job.teachers)), workers)
        self.student.to(memory_format=torch.channels_last)
        self.teachers.to(memory_format=torch.channels_last)
        stages, taught_stages = tuple(self.method.student_stages), tuple(self.method.teacher_stages)
        network, members = self.student, list(self.teachers.members)

        def student_outputs(images: Tensor) -> StudentOutput:
            return network.outputs(images, stages)

        def member_outputs(member: StagedNetwork, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            found = member.outputs(images)
            return found.logits, found.pooled, [found.stages[name] for name in taught_stages]

        options: dict[str, Any] = {"dynamic": False, "mode": mode}
        self._student_outputs = torch.compile(student_outputs, **options)
        self._members = [torch.compile(partial(member_outputs, member), **options) for member in members]
        self._stages = taught_stages

    def loss(self, batch: Batch) -> Tensor:
        """The total loss of the method; networks compute in bfloat16."""
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                found = [outputs(batch.images) for outputs in self._members]
            teachers = TeacherOutput(
                torch.stack([logits.float() for logits, _, _ in found]),
                tuple(pooled for _, pooled, _ in found),
                tuple(dict(zip(self._stages, stages, strict=True)) for _, _, stages in found),
            )
            return self._total(self._student_outputs(batch.images), teachers, batch)


def loader_rate(image_set: ImageSet, index: Tensor, batch_size: int, batches: int, workers: int) -> float:
    """Images per second of the loader alone, over at most `batches` batches."""
    loader = plain_loader(image_set, index, batch_size, workers)
    batch_iterator = chain.from_iterable(repeat(loader))  # an epoch may consist of one batch
    ready = min(1 + 2 * workers, 1 + (len(loader) - 1) // 2)
    for _ in range(ready):  # starts the workers and uses up prefetched batches
        next(batch_iterator)
    count = max(1, min(batches, len(loader) - ready))
    return count * batch_size / seconds_of(lambda: [next(batch_iterator) for _ in range(count)])
