"""Trained weights of networks of timm, torchvision and the user's own modules, and their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ekd_lightning.errors import UserError, few
from ekd_lightning.networks.cutting import ABSENT, select_classes
from ekd_lightning.networks.library import as_network, make_module, own_options, usual
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import StagedNetwork
from ekd_lightning.networks.weights import read_foreign_checkpoint


def load_library_network(
    spec: NetworkSpec,
    weights: Path | None,
    *,
    classes: Sequence[int] | None = None,
    state_key: str | None = None,
    fresh_head: bool = False,
) -> StagedNetwork:
    """Builds a network of a library with trained weights.

    Args:
        spec: The network's spec, with the data's number of classes.
        weights: A safetensors file or a checkpoint with the library's tensor names; None for the weights that the
            library publishes.
        classes: For each class of the data its position among those of the weights, see `positions`. A class that the
            weights lack has the logit `cutting.UNKNOWN_LOGIT`. None if the classes are the same.
        state_key: Key of the weights in a checkpoint; None tries the usual keys.
        fresh_head: Whether a new classifier for the data's classes replaces the trained one.

    Returns:
        The network on the CPU, in eval mode. The global random generator is advanced only for a fresh head.

    Raises:
        UserError: If the weights do not fit the network, or their classes do not fit the data's.
    """
    with torch.random.fork_rng(devices=[]):
        network = as_network(spec, _filled(spec, weights, state_key).eval())
    head = network.head
    if fresh_head or classes is not None:
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"network {spec.name!r} does not end with a linear layer, so its classes cannot be changed; remove "
                "classes and finetune=head, or choose another network"
            )
        if fresh_head:
            head = nn.Linear(head.in_features, spec.num_classes, head.bias is not None)
        else:
            assert classes is not None
            head = select_classes(head, positions(spec, classes, (), head.out_features))
    if isinstance(head, nn.Linear) and head.out_features != spec.num_classes:
        raise UserError(
            f"teacher {spec.name!r} predicts {head.out_features} classes, the data has {spec.num_classes}: map them "
            "with classes=[..], or train a new head with finetune=head"
        )
    network.head = head
    return network.eval()


def _filled(spec: NetworkSpec, weights: Path | None, state_key: str | None) -> nn.Module:
    """Builds the module with its trained weights and their number of classes."""
    options = own_options(spec)
    if weights is None:
        if spec.name.startswith("module:"):
            return make_module(spec.name, spec.num_classes, options)  # the function itself loads weights
        return make_module(spec.name, spec.num_classes, options, pretrained=True)
    state = read_foreign_checkpoint(weights, state_key)
    # A function of the user does not get the number of classes, so it need not be determined.
    predicted = spec.num_classes if spec.name.startswith("module:") else _classes_in(spec, state)
    module = make_module(spec.name, predicted, options)
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(problems.values()):
        shown = [f"{kind}: {few(names)}" for kind, names in problems.items() if names]
        raise UserError(f"{weights} does not fit network {spec.name!r}: {'; '.join(shown)}")
    module.load_state_dict({**own, **state})
    return module


def weight_classes(spec: NetworkSpec, weights: Path | None, state_key: str | None = None) -> int:
    """Returns the number of classes of trained weights, before they are loaded; see `load_library_network`.

    That of the spec is returned for a network without layers.

    Raises:
        UserError: As `load_library_network`.
    """
    if weights is None and (published := usual(spec.name)):
        return published.num_classes
    return _classes_in(spec, read_foreign_checkpoint(weights, state_key) if weights else {})


def _classes_in(spec: NetworkSpec, state: Mapping[str, Tensor]) -> int:
    """Returns the outputs of the last layer: from the file if it has the layer, else from the module."""
    own = spec.name.startswith("module:")  # a function of the user may load its own weights
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if own else "meta"):
        module = make_module(spec.name, spec.num_classes, own_options(spec))
    layers = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    if not layers:
        return spec.num_classes
    last = [*layers][-1]
    return state.get(f"{last}.weight", layers[last].weight).shape[0]


def positions(spec: NetworkSpec, classes: Sequence[int | str], class_names: Sequence[str], predicted: int) -> list[int]:
    """Returns the position of each class of the data among the classes of the weights; `ABSENT` if they lack it.

    `classes` is the user's setting: positions, or the names of all classes of the weights, in their order. The weights
    predict `predicted` classes, and the spec has the data's number of classes.

    Raises:
        UserError: For a wrong number of positions or names, a position out of range, or if no name is one of the
            data's.
    """
    if all(isinstance(one, str) for one in classes):
        if len(classes) != predicted:
            raise UserError(
                f"teacher {spec.name!r}: classes names {len(classes)} classes, but its weights predict {predicted}; "
                "give the names of all of them, in their order"
            )
        known = [str(one).casefold() for one in classes]
        found = [known.index(name.casefold()) if name.casefold() in known else ABSENT for name in class_names]
        if max(found, default=ABSENT) == ABSENT:
            raise UserError(f"teacher {spec.name!r}: none of its classes is one of the data's ({few(class_names)})")
        return found
    possible = range(ABSENT, predicted)
    if len(classes) != spec.num_classes or any(one not in possible for one in classes):
        raise UserError(
            f"teacher {spec.name!r}: classes={list(classes)} must be {spec.num_classes} positions in "
            f"0 .. {predicted - 1} (-1: not known), one for each class of the data, or the names of all "
            f"{predicted} classes of the teacher"
        )
    return [int(one) for one in classes]
