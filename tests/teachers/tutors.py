"""Two small teachers, the images that they are asked about, and tables of what they say."""

from __future__ import annotations

from pathlib import Path

import torch

from ekd_lightning.data.loader import Batch
from ekd_lightning.data.views import CropFlip
from ekd_lightning.networks import (
    NetworkSpec,
    TeacherEnsemble,
    TeacherIdentity,
    build_network,
    normalization,
    state_sha256,
)
from ekd_lightning.networks.staged import TeacherOutput
from ekd_lightning.teachers.source import TeacherFormat
from ekd_lightning.teachers.tabled import TabledTeachers

N, C, SIDE = 40, 5, 8  # images of the set, classes, pixels
VIEWS = CropFlip(padding=1)
V = VIEWS.num_views
PLAIN = TeacherFormat(precision="float32", compile="never")
POOL = torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def tutors(*networks: str) -> TeacherEnsemble:
    """Teachers tutor0, tutor1, ..., always of the same weights."""
    torch.manual_seed(0)
    members = [build_network(NetworkSpec(name, C, normalization("cifar10"))) for name in networks]
    identities = [
        TeacherIdentity(f"tutor{m}", state_sha256(member), "file", name)
        for m, (name, member) in enumerate(zip(networks, members, strict=True))
    ]
    return TeacherEnsemble(members, identities)


def gather(index: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    return VIEWS(POOL[index], view, index)


def make_batch(index: list[int], view: list[int]) -> Batch:
    at, which = torch.tensor(index), torch.tensor(view)
    return Batch(gather(at, which), at % C, at, which, torch.ones(len(index), dtype=torch.bool))


def tabled(ensemble: TeacherEnsemble, folder: Path, **changes) -> TabledTeachers:
    usual = {"image_sets": [("b" * 64, N)], "views": VIEWS, "include_pooled": True}
    return TabledTeachers(ensemble, folder, **{**usual, "image_size": SIDE, "how": PLAIN, **changes})


def same(first: TeacherOutput, second: TeacherOutput) -> bool:
    """Whether two answers are equal, bit for bit."""
    pairs = [(first.logits, second.logits), *zip(first.pooled, second.pooled, strict=True)]
    for one, other in zip(first.stages, second.stages, strict=True):
        assert set(one) == set(other)
        pairs += [(one[name], other[name]) for name in one]
    return all(torch.equal(a, b) for a, b in pairs)
