"""Deployed students: the student as it is used, images in, logits out, and nothing of its training.

Shape letters: B batch, C classes, K branches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError
from ekd_lightning.networks.frozen import FrozenStudent
from ekd_lightning.networks.staged import NetworkSpec
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


KIND = "ekd_kind"
DEPLOYED = "deployed student"
REQUIRED = ("spec", "class_names", "image_size")


class DeployedModel:
    """A classifier, ready for use; made by `load_deployed`.

    Attributes:
        format: `safetensors`, `onnx` or `torch-export`.
        metadata: What is known of it: classes, data, method, metrics, hashes, versions.
        module: The PyTorch module that computes; None where ONNX Runtime does.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        metadata: Mapping[str, Any],
        file_format: str,
        module: nn.Module | None = None,
    ) -> None:
        """Wraps what computes.

        Args:
            run: Maps float32 images [B, 3, H, W] to logits [B, C].
            metadata: As read from the file.
            file_format: The file's format.
            module: What `run` calls, if it is a module.
        """
        self._run, self.metadata, self.format, self.module = run, dict(metadata), file_format, module

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class, in the order of the logits."""
        return tuple(self.metadata["class_names"])

    @property
    def image_size(self) -> int:
        """Height, and width, of the images in pixels."""
        return int(self.metadata["image_size"])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Classifies a batch of any size.

        Args:
            images: float [B, 3, H, W] in [0, 1], RGB, not normalised.

        Returns:
            Logits, float32 [B, C], on the model's device.

        Raises:
            TypeError: If the images are integers.
            ValueError: If they have another shape.
        """
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}; divide by 255")
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be [B, 3, {size}, {size}], got {list(images.shape)}")
        return self._run(images.float())

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities [B, C]; see `__call__`."""
        return self(images).softmax(dim=-1)

    def classify(self, images: Tensor) -> list[tuple[str, float]]:
        """The most probable class of each image, with its probability."""
        confidence, index = self.probabilities(images).max(dim=-1)
        names = self.class_names
        return [(names[i], p) for i, p in zip(index.tolist(), confidence.tolist(), strict=True)]

    def __repr__(self) -> str:
        spec = self.metadata["spec"]
        what = f"{spec['network']['name']}, {spec['branches']} branches, {len(self.class_names)} classes"
        return f"DeployedModel({what}, {self.format})"


def pack_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as strings: one JSON value a key, as all three formats can hold them."""
    return {KIND: DEPLOYED, **{key: json.dumps(value, allow_nan=False) for key, value in metadata.items()}}


def unpack_metadata(strings: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Reads what `pack_metadata` made; strings that it did not make are left out.

    Raises:
        UserError: If the file is not a deployed student, or its description is damaged.
    """
    found = strings.get(KIND)
    if found != DEPLOYED:
        what = f"a {found}" if found else "nothing of ours"
        hint = " (ekd-export makes one from a finished run)" if found == "student" else ""
        raise UserError(f"{path}: holds {what}, not a {DEPLOYED}{hint}")
    metadata: dict[str, Any] = {}
    for key, value in strings.items():
        if key not in (KIND, "ekd_sha256"):
            try:
                metadata[key] = json.loads(value)
            except (ValueError, TypeError):
                continue  # another tool's
    missing = [key for key in REQUIRED if key not in metadata]
    if missing:
        raise UserError(f"{path}: its description of the student lacks {', '.join(missing)}")
    return metadata
