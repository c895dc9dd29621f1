"""Networks of the user: plain modules as teachers, and a trial of a network before anything is trained.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ekd_lightning.errors import UserError, raised
from ekd_lightning.networks.cutting import cut, keeping_modes, unknown_classes
from ekd_lightning.networks.spec import NORMALIZATIONS, NetworkSpec, Normalization
from ekd_lightning.networks.staged import ImageSize, StagedNetwork, sides
from ekd_lightning.networks.student import BranchedStudent

STATISTICS = f"one of {', '.join(sorted(NORMALIZATIONS))} (images in [0, 1] as they are)"
"""What may be given, for messages."""
_ROUNDING = 1e-3  # of probabilities, also in half precision


def as_staged(
    module: nn.Module, statistics: Normalization | str | None = None, num_classes: int | None = None
) -> StagedNetwork:
    """Returns a plain module as a staged network with the same weights and outputs, in its present mode.

    The module is cut into stages where that is possible, see `cutting.cut`.

    Args:
        module: Maps images [B, 3, H, W] to logits [B, C]. Its layers are shared, not copied.
        statistics: The normalisation of its images, or its name; `unit` if it takes images in [0, 1] as they are. None
            for a `StagedNetwork`, which has its own and is returned as it is.
        num_classes: C; None for the outputs of the linear layer at the module's end.

    Raises:
        UserError: If it is no module, returns more than logits, is not in float32, has a normalisation of its own, none
            or an unknown one, or another or an unknown number of classes.
    """
    kind = type(module).__name__
    if not isinstance(module, nn.Module) or isinstance(module, BranchedStudent):
        raise UserError(f"a teacher must be a torch.nn.Module that returns logits, not a {kind}")
    if isinstance(module, StagedNetwork):
        if statistics is not None:
            raise UserError(f"normalization={statistics!r}: the network {module.spec.name!r} has its own")
        if num_classes not in (None, module.spec.num_classes):
            raise UserError(
                f"num_classes={num_classes}: {module.spec.name!r} predicts {module.spec.num_classes} classes"
            )
        return module
    weight = next((value for value in module.parameters() if value.is_floating_point()), torch.zeros(()))
    if weight.dtype is not torch.float32:
        raise UserError(f"{kind} has weights of {weight.dtype}, but images are float32: convert it by .float()")
    if not all(
        value.isfinite().all() for value in module.parameters() if not isinstance(value, UninitializedParameter)
    ):
        raise UserError(f"{kind} has weights that are infinite or NaN")
    parts = cut(module)
    found = parts.head.out_features if isinstance(parts.head, nn.Linear) else num_classes
    if found is None:
        raise UserError(f"{kind} does not end with a linear layer: pass num_classes=")
    if num_classes not in (None, found):
        raise UserError(f"num_classes={num_classes}: {kind} predicts {found} classes")
    if statistics is None:
        raise UserError(
            f"normalization: must be given, as {kind} does not say what it was trained with: {STATISTICS}, or "
            "Normalization(mean, std)"
        )
    spec = NetworkSpec(kind, found, NORMALIZATIONS[statistics] if isinstance(statistics, str) else statistics)
    network = StagedNetwork(spec, parts.stages, parts.num_features, neck=parts.neck, head=parts.head)
    with keeping_modes(module):
        network.train(module.training)
    network.normalize.to(weight.device)
    return network


def unknown_to(network: StagedNetwork, num_classes: int) -> frozenset[int]:
    """Returns the classes 0 .. num_classes-1 that a network does not predict: all, if it predicts another number."""
    if network.spec.num_classes != num_classes:
        return frozenset(range(num_classes))
    return unknown_classes(network.head)


def check_outputs(network: StagedNetwork | BranchedStudent, image_size: ImageSize, where: str = "") -> None:
    """Tries a network, or branch 0 of a student, on two black images, in eval mode; it does not change.

    `where` is the setting that names the network, for the message.

    Raises:
        UserError: If it fails, or does not return floating-point logits [2, C]; probabilities are none.
    """
    device = next(network.buffers()).device
    images = torch.zeros(2, 3, *sides(image_size), device=device)
    label = f"{where}: network {network.spec.name!r}" if where else f"network {network.spec.name!r}"
    try:
        with keeping_modes(network), torch.no_grad(), torch.random.fork_rng(devices=[]):
            network.eval()
            if isinstance(network, BranchedStudent):
                logits: object = network.branches[0](network.trunk(images)[0])[0]
            else:
                logits = network(images)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None
    except Exception as error:  # the user's module may raise anything
        raise UserError(f"{label} fails on images {list(images.shape)}: {raised(error)}") from error
    wanted = [len(images), network.spec.num_classes]
    if not isinstance(logits, Tensor):
        raise UserError(f"{label} returns a {type(logits).__name__}, not logits {wanted}")
    if list(logits.shape) != wanted or not logits.is_floating_point():
        kind = "" if logits.is_floating_point() else f" of {logits.dtype}"
        raise UserError(
            f"{label} returns values {list(logits.shape)}{kind} for images {list(images.shape)}, not logits {wanted}"
        )
    if wanted[1] > 1 and (logits >= 0).all() and ((logits.sum(1) - 1).abs() < _ROUNDING).all():
        raise UserError(f"{label} returns probabilities, not logits: leave out its softmax")
