"""Teacher ensemble: M frozen teachers, which no checkpoint contains.

Shape letters: B batch, C classes, D features, M teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.networks.own import as_staged
from ekd_lightning.networks.spec import Normalization
from ekd_lightning.networks.staged import LAST, StagedNetwork, TeacherOutput, stage_and_grid
from ekd_lightning.networks.weights import state_sha256

_Statistics = Normalization | str | None


@dataclass(frozen=True)
class TeacherIdentity:
    """Identity of a teacher in the run's record.

    Attributes:
        id: the teacher's name: the zoo id, the file's stem, or the key in the teacher store.
        sha256: `weights.state_sha256` of the network; it does not depend on the file that holds the weights.
        source: `zoo`, `file`, `trained`, or `memory` for a module that was handed over in Python.
        network: name of its network.
        detail: further facts (file, its SHA-256, accuracy, recipe); JSON-able.
    """

    id: str
    sha256: str
    source: str
    network: str
    detail: dict[str, Any] = field(default_factory=dict, hash=False)


class TeacherEnsemble(nn.Module):
    """M teachers: always in eval mode, without gradients, absent from every state dict.

    Members move with `.to(device)` like any module. Teachers come from their own files: `load_state_dict` reports
    weights for them as unexpected keys and does not load them.

    Attributes:
        members: the M networks.
        identities: one for each member, in order.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        identities: Sequence[TeacherIdentity] | None = None,
        *,
        normalization: _Statistics | Sequence[_Statistics] = None,
        num_classes: int | None = None,
    ) -> None:
        """Freezes the members, without copying them.

        Args:
            members: M networks, at least one, all with the same number of classes: a `StagedNetwork`, or any module
                from images [B, 3, H, W] to logits [B, C]. A module that ends with a linear layer also has pooled
                features, and one that torch.fx can trace has stages.
            identities: their identities, in the same order; None for the class or network and the position as id.
            normalization: `Normalization` (or its name, such as `imagenet`) that plain modules were trained with, one
                for all or one for each member; `unit` if they take images in [0, 1] as they are. A `StagedNetwork` has
                its own: None.
            num_classes: C; needed for modules that do not end with a linear layer.

        Raises:
            UserError: when there are no members, their numbers of classes differ, a module cannot be a teacher, or
                a plain module has no normalisation, or there is neither one nor one for each member.
            ValueError: when there is not one identity for each member.
        """
        super().__init__()
        if not isinstance(members, Sequence | nn.ModuleList):
            raise UserError(f"teachers must be a list of modules, not a {type(members).__name__}")
        if not members:
            raise UserError("a teacher ensemble needs at least 1 teacher, got 0")
        statistics = _for_each(normalization, members)
        networks = [as_staged(one, own, num_classes) for one, own in zip(members, statistics, strict=True)]
        for member in members:
            for parameter in member.eval().parameters():  # also of parts of a plain module that no stage contains
                parameter.requires_grad_(False)
        if identities is None:
            identities = [
                TeacherIdentity(f"{one.spec.name}-{m}", state_sha256(one), "memory", one.spec.name)
                for m, one in enumerate(networks)
            ]
        if len(networks) != len(identities):
            raise ValueError(f"{len(networks)} teachers but {len(identities)} identities")
        for member, identity in zip(networks, identities, strict=True):
            if member.spec.num_classes != networks[0].spec.num_classes:
                raise UserError(
                    f"teachers disagree on the number of classes: {identities[0].id!r} has "
                    f"{networks[0].spec.num_classes}, {identity.id!r} has {member.spec.num_classes}"
                )
        self.identities = tuple(identities)
        # A tuple, so that they are not submodules: no state dict, optimiser or `.train()` of a parent reaches them.
        self.members = tuple(network.eval().requires_grad_(False) for network in networks)

    @property
    def num_teachers(self) -> int:
        """M."""
        return len(self.members)

    @property
    def device(self) -> torch.device:
        """Device of the members."""
        return self.members[0].normalize.mean.device

    @property
    def num_classes(self) -> int:
        """C."""
        return self.members[0].spec.num_classes

    def check_stages(self, stages: Sequence[str]) -> None:
        """Refuses stages that a teacher lacks (`last` is any; with or without a grid, see `staged.on_grid`)."""
        for member, identity in zip(self.members, self.identities, strict=True):
            for name, _ in map(stage_and_grid, stages):
                if name not in member.stages and not (name == LAST and len(member.stages)):
                    raise unknown_name(f"stage of teacher {identity.id!r}:", name, member.stage_names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TeacherEnsemble:
        for member in self.members:  # `.to(device)` must reach them
            member._apply(fn, recurse)
        return self

    # Not inference_mode: losses must be able to save these tensors for their backward pass.
    @torch.no_grad()
    def forward(self, images: Tensor, stages: Sequence[str] = ()) -> TeacherOutput:
        """Maps images [B, 3, H, W] in [0, 1], not normalised, to logits [M, B, C], features M × [B, D_m], and stages.

        `stages` names those of every teacher; `stage2.4x4` is stage2 averaged to a grid, see `staged.on_grid`.

        Raises:
            UserError: when a teacher does not have one of the stages.
        """
        self.check_stages(stages)
        return TeacherOutput.of([member.outputs(images) for member in self.members], stages)

    def verify(self) -> None:
        """Checks that no member has changed.

        Raises:
            RuntimeError: when a member's hash differs from that of its identity.
        """
        for member, identity in zip(self.members, self.identities, strict=True):
            found = state_sha256(member)
            if found != identity.sha256:
                raise RuntimeError(f"teacher {identity.id!r} has changed: SHA-256 {found}, was {identity.sha256}")


def _for_each(statistics: _Statistics | Sequence[_Statistics], members: Sequence[nn.Module]) -> list[_Statistics]:
    """Returns the normalisation of each member; one for all is meant for those that have none of their own."""
    if statistics is None or isinstance(statistics, str | Normalization):
        plain = [not isinstance(member, StagedNetwork) for member in members]
        return [statistics if own or not any(plain) else None for own in plain]
    if len(statistics) != len(members):
        raise UserError(
            f"normalization has {len(statistics)} entries for {len(members)} teachers: give one, or one for each "
            "(a name, Normalization(mean, std), or None)"
        )
    return list(statistics)
