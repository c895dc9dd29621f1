"""Conversion of foreign checkpoints into networks of this package by explicit maps of tensor names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ekd_lightning.errors import Registry, UserError, few
from ekd_lightning.networks.registry import build_network
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import StagedNetwork
from ekd_lightning.networks.weights import read_foreign_checkpoint


@dataclass(frozen=True)
class KeyMap:
    """Map from the tensor names of a foreign checkpoint to names of this package.

    Attributes:
        rules: (pattern, replacement) pairs; the first pattern that matches a whole foreign name gives the name in this
            package (`re.Match.expand` syntax).
        ignored: patterns of foreign names without a counterpart, which are dropped.
        absent: patterns of this package's names that such checkpoints may lack. They keep their initial values, so
            only counters without influence on outputs are allowed here.
    """

    rules: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def rename(self, key: str) -> str | None:
        """Returns this package's name for a foreign one, or None when no rule matches."""
        for pattern, replacement in self.rules:
            if match := re.fullmatch(pattern, key):
                return match.expand(replacement)
        return None


_RESNET = (
    (r"conv1\.(\w+)", r"stages.stem.conv.\1"),
    (r"bn1\.(\w+)", r"stages.stem.bn.\1"),
    (r"layer([123])\.(\d+)\.((?:conv|bn)[12]\.\w+)", r"stages.stage\1.\2.\3"),
)
# PyTorch before 0.4.1 did not save these counters; outputs do not depend on them.
_COUNTERS = (r".*\.num_batches_tracked",)

KEY_MAPS: Registry[KeyMap] = Registry("key map")
KEY_MAPS |= {
    "akamaster_resnet": KeyMap(
        rules=(
            *_RESNET,
            (r"layer([123])\.(\d+)\.shortcut\.([01]\.\w+)", r"stages.stage\1.\2.downsample.\3"),
            (r"linear\.(\w+)", r"head.\1"),
        ),
        absent=_COUNTERS,
    ),
    "chenyaofo_resnet": KeyMap(
        rules=(
            *_RESNET,
            (r"layer([123])\.(\d+)\.downsample\.([01]\.\w+)", r"stages.stage\1.\2.downsample.\3"),
            (r"fc\.(\w+)", r"head.\1"),
        )
    ),
    "densenet_bc": KeyMap(
        rules=(
            (r"conv1\.(\w+)", r"stages.stem.conv.\1"),
            (r"block([123])\.layer\.(\d+)\.((?:bn|conv)[12]\.\w+)", r"stages.stage\1.block.\2.\3"),
            (r"trans1\.(bn|conv)1\.(\w+)", r"stages.stage2.transition.\1.\2"),
            (r"trans2\.(bn|conv)1\.(\w+)", r"stages.stage3.transition.\1.\2"),
            (r"bn1\.(\w+)", r"stages.stage3.bn.\1"),
            (r"fc\.(\w+)", r"head.\1"),
        )
    ),
    # A state dict of one of this package's networks, saved with torch.save.
    "own": KeyMap(rules=((r"((?:stages|head)\..+)", r"\1"),)),
}


def load_foreign(path: str | Path, spec: NetworkSpec, key_map: str) -> StagedNetwork:
    """Builds a network, on the CPU in eval mode, with the weights of a foreign checkpoint, which must fit exactly.

    No code in the file is executed, and the global random generator is not advanced. `key_map` is a name in `KEY_MAPS`.

    Raises:
        UserError: when the file cannot be read safely (see `weights.read_foreign_checkpoint`), or does not fit: for
            foreign names without a rule, two foreign names for one tensor, missing tensors, or other shapes.
    """
    rules = KEY_MAPS[key_map]
    with torch.random.fork_rng(devices=[]):
        network = build_network(spec)
    ours = network.state_dict()
    converted: dict[str, Tensor] = {}
    unmapped, doubled, shapes = [], [], []
    for key, value in read_foreign_checkpoint(path).items():
        if _matches(key, rules.ignored):
            continue
        name = rules.rename(key)
        if name is None or name not in ours:
            unmapped.append(key)
        elif name in converted:
            doubled.append(key)
        else:
            if value.shape != ours[name].shape:
                shapes.append(f"{key} {list(value.shape)} instead of {list(ours[name].shape)}")
            converted[name] = value
    problems = {
        "names without a counterpart": unmapped,
        "two names for one tensor": doubled,
        "missing": [name for name in ours if name not in converted and not _matches(name, rules.absent)],
        "other shapes": shapes,
    }
    if any(problems.values()):
        misfits = _misfits(problems, spec, key_map, converted.get("head.weight"))
        raise UserError(f"{path} does not fit {misfits}")
    network.load_state_dict({**ours, **converted}, strict=True)
    return network.eval()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _misfits(problems: dict[str, list[str]], spec: NetworkSpec, key_map: str, head: Tensor | None) -> str:
    """Describes the network and the first few problems of each kind."""
    parts = []
    # The most common mistake first: another number of classes.
    if head is not None and head.dim() == 2 and head.shape[0] != spec.num_classes:
        parts.append(f"it has {head.shape[0]} classes")
    parts += [f"{problem}: {few(names)}" for problem, names in problems.items() if names]
    options = f" {dict(spec.options)}" if spec.options else ""
    return f"network {spec.name!r}{options} with {spec.num_classes} classes (key map {key_map!r}): {'; '.join(parts)}"
