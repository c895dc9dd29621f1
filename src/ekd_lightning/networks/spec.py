"""What determines a network's structure: its name, class count, normalisation and options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ekd_lightning.errors import UserError, unknown_name

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Normalization:
    """Per-channel statistics that a network applies to images in [0, 1].

    Attributes:
        mean: subtracted from the red, green and blue channel.
        std: what the difference is divided by; every entry above 0.

    Raises:
        UserError: when there are not three numbers each, or a std is not above 0.
    """

    mean: Triple
    std: Triple

    def __post_init__(self) -> None:
        try:
            mean, std = (tuple(float(value) for value in values) for values in (self.mean, self.std))
        except (TypeError, ValueError):
            raise UserError(f"normalization: mean {self.mean!r}, std {self.std!r} are not numbers") from None
        # A single comparison would let NaN through, hence the negation.
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise UserError(f"normalization: mean {mean}, std {std} must be three numbers each, std above 0")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)


NORMALIZATIONS: dict[str, Normalization] = {
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Normalization((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "unit": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "centered": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def normalization(name: str) -> Normalization:
    """Looks up a named normalisation.

    Raises:
        UserError: when there is none of that name; the nearest one is offered.
    """
    if name not in NORMALIZATIONS:
        raise unknown_name("normalization", name, NORMALIZATIONS)
    return NORMALIZATIONS[name]


@dataclass(frozen=True)
class NetworkSpec:
    """All that determines a network's structure (not its weights).

    Attributes:
        name: a registered network.
        num_classes: C, at least 1.
        normalization: what the network does to images in [0, 1] first.
        options: keyword arguments of the registered builder, JSON-able.

    Raises:
        UserError: when the class count is not a whole number above 0 or an option is not JSON-able.
    """

    name: str
    num_classes: int
    normalization: Normalization
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if (
            not isinstance(self.num_classes, int)
            or isinstance(self.num_classes, bool)
            or self.num_classes < 1
        ):
            raise UserError(f"network {self.name!r}: num_classes={self.num_classes!r} must be at least 1")
        try:
            # A private copy in its JSON form: equal specs are then equal whatever file they came from.
            options = json.loads(json.dumps(dict(self.options)))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"network {self.name!r}: options {self.options!r} are not JSON-able ({error})"
            ) from None
        object.__setattr__(self, "options", options)

    def to_dict(self) -> dict[str, Any]:
        """Returns the spec as plain JSON-able values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkSpec:
        """Rebuilds a spec from `to_dict` (a normalisation may also be given by its name).

        Raises:
            UserError: when a key is missing, unknown or of the wrong kind.
        """
        try:
            statistics = values["normalization"]
            named = isinstance(statistics, str)
            statistics = normalization(statistics) if named else Normalization(**statistics)
            rest = {key: value for key, value in values.items() if key != "normalization"}
            return cls(normalization=statistics, **rest)
        except (TypeError, KeyError) as error:
            raise UserError(f"not a network spec: {dict(values)!r} ({error})") from None
