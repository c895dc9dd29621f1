"""The student as it is used: images in, logits out, and nothing of its training.

Shape letters: B batch, C classes, K branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError
from ekd_lightning.networks.frozen import FrozenStudent
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.student import BranchedStudent


@dataclass(frozen=True)
class DeployedSpec:
    """All that determines a deployed student's structure (not its weights).

    Attributes:
        network: What trunk and branches are cut from; holds class count and normalisation.
        branches: K, those that were kept.
        split_after: The last shared stage, or `none`.
        ensemble: How the branches are coupled. The gate of some of the branches is that of all of them, its weights
            scaled to sum to 1.
        folded: Whether batch norms are part of the convolutions (or the gate's linear layer) before them.
        probabilities: Whether probabilities are returned beside logits.
    """

    network: NetworkSpec
    branches: int
    split_after: str
    ensemble: str
    folded: bool = True
    probabilities: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what the student returns."""
        return ("logits", "probabilities") if self.probabilities else ("logits",)

    def to_dict(self) -> dict[str, Any]:
        """Returns the spec as plain JSON-able values."""
        return {**asdict(self), "network": self.network.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeployedSpec:
        """Rebuilds a spec from `to_dict`.

        Raises:
            UserError: When a key is missing, unknown or of the wrong kind.
        """
        try:
            rest = {key: value for key, value in values.items() if key != "network"}
            return cls(NetworkSpec.from_dict(values["network"]), **rest)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"not the description of a deployed student ({error})") from None

    def build(self) -> DeployedStudent:
        """Builds the structure with weights that mean nothing yet; the global random generator is not advanced."""
        with torch.random.fork_rng(devices=[]):
            student = BranchedStudent(
                self.network, branches=self.branches, split_after=self.split_after, ensemble=self.ensemble
            )
        return DeployedStudent(student, fold=self.folded, probabilities=self.probabilities)


class DeployedStudent(nn.Module):
    """A copy of a student for use: normalisation inside, eval mode, no gradients, any batch size.

    Attributes:
        spec: What it was built from.
    """

    def __init__(self, student: BranchedStudent, *, fold: bool = True, probabilities: bool = False) -> None:
        """Copies the student, which stays as it is; `cut_branches` leaves some of its branches out before.

        Args:
            student: With the weights that are to be used.
            fold: Whether batch norms are folded into the convolutions before them. Those that follow none (in
                pre-activation networks) stay.
            probabilities: Whether probabilities are returned beside logits.
        """
        super().__init__()
        self.spec = DeployedSpec(
            student.spec,
            student.num_branches,
            student.split_after,
            student.ensemble,
            folded=fold,
            probabilities=probabilities,
        )
        # Contiguous: other runtimes have formats of their own, and read strides literally.
        self.network = FrozenStudent(student, fold=fold, channels_last=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Classifies images.

        Args:
            images: float32 [B, 3, H, W] in [0, 1], RGB, not normalised.

        Returns:
            Logits [B, C] (log-probabilities for `mean_probs`), or these and probabilities [B, C].
        """
        logits = self.network(images)
        return (logits, logits.softmax(dim=-1)) if self.spec.probabilities else logits
