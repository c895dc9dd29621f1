"""What a user would write without this package: torchvision transforms in workers, float32, live teachers.

Idiomatic and fair: images are already in memory, teachers run under `no_grad`, workers persist, and their best
number is looked for.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ekd_lightning.bench.timing import seconds_of
from ekd_lightning.data import ImageSet
from ekd_lightning.data.loader import Batch
from ekd_lightning.methods import Method
from ekd_lightning.networks import BranchedStudent, TeacherEnsemble


class PilImages(Dataset[tuple[Tensor, int]]):
    """Images as `torchvision.datasets.CIFAR10` hands them out: NumPy to PIL to transforms to tensor."""

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
    image_set: ImageSet, index: Tensor, batch_size: int, workers: int
) -> DataLoader[tuple[Tensor, int]]:
    """Shuffled batches by PIL transforms."""
    return DataLoader(
        PilImages(image_set, index),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


class PlainLoop:
    """Trains a student under live teachers, in float32.

    Args:
        loader: Images and labels.
        student: The student; trained by SGD with Nesterov momentum.
        method: The loss: the same as the other side's.
        teachers: The frozen teachers.
        device: Where to compute.
    """

    def __init__(
        self,
        loader: DataLoader[tuple[Tensor, int]],
        student: BranchedStudent,
        method: Method,
        teachers: TeacherEnsemble,
        device: torch.device,
    ) -> None:
        self.loader, self.device = loader, device
        self.student, self.method, self.teachers = student.to(device), method.to(device), teachers.to(device)
        parameters = [*student.parameters(), *method.parameters()]
        self.optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self._batches = self._endless()

    def _endless(self) -> Generator[list[Tensor], None, None]:
        while True:
            yield from self.loader

    def step(self) -> None:
        """One training step."""
        images, labels = (tensor.to(self.device) for tensor in next(self._batches))
        nothing = torch.zeros_like(labels)
        batch = Batch(images, labels, nothing, nothing, nothing.bool())
        taught = self.teachers(images)
        result = self.method(self.student.outputs(images), taught, batch, epoch=0, step=0, progress=0.0)
        self.optimizer.zero_grad()
        result.total.backward()
        self.optimizer.step()

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def images_per_second(self, steps: int) -> float:
        """The rate over some steps, the loader included."""
        self.teachers.to(self.device)  # Lightning takes them off the device when a fit of the other side ends
        seconds = seconds_of(lambda: self._steps(steps), self.device)
        return steps * int(self.loader.batch_size or 1) / seconds

    def close(self) -> None:
        """Ends the loader's workers now; left to the garbage collector they end, slowly, in another way's time."""
        self._batches.close()
        iterator = self.loader._iterator
        self.loader._iterator = None
        if iterator is not None and self.loader.num_workers:
            # Dropping the iterator is not enough: something else may hold it, and it does not wait to the end.
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            for worker in iterator._workers:  # type: ignore[attr-defined]
                worker.join()


def best_workers(
    image_set: ImageSet, index: Tensor, batch_size: int, candidates: tuple[int, ...], batches: int
) -> dict[int, float]:
    """Images per second of the loader alone for each number of workers."""
    rates = {}
    for workers in candidates:
        loader = plain_loader(image_set, index, batch_size, workers)
        batch_iterator = iter(loader)
        next(batch_iterator)  # workers have started
        count = max(1, min(batches, len(loader) - 1))
        seconds = seconds_of(lambda i=batch_iterator, n=count: [next(i) for _ in range(n)])  # type: ignore[misc]
        rates[workers] = count * batch_size / seconds
    return rates
