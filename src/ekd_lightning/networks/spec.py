"""Specs of networks: all that determines a network's structure, its normalisation of images included."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ekd_lightning.errors import Registry, UserError

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Normalization:
    """Per-channel statistics that a network applies to images in [0, 1].

    Attributes:
        mean: subtracted from the red, green and blue channels.
        std: divisors of the differences; all above 0.

    Raises:
        UserError: when either is not three finite numbers, or a std is not above 0.
    """

    mean: Triple
    std: Triple

    def __post_init__(self) -> None:
        try:
            mean, std = (tuple(float(value) for value in values) for values in (self.mean, self.std))
        except (TypeError, ValueError, OverflowError):
            mean = std = ()
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise UserError(
                f"normalization: mean {self.mean!r:.60}, std {self.std!r:.60} must be three finite numbers each, "
                "std above 0"
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)


NORMALIZATIONS: Registry[Normalization] = Registry(
    "normalization",
    {
        "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar100": Normalization((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "unit": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "centered": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    },
)


def normalization(name: str) -> Normalization:
    """Looks up a normalisation by name; an unknown one is a `UserError`."""
    return NORMALIZATIONS[name]


_OPTIONAL = ("image_size", "projection")  # attributes of `NetworkSpec` that may be None


@dataclass(frozen=True)
class NetworkSpec:
    """Everything that determines a network's structure (not its weights).

    Attributes:
        name: a registered network.
        num_classes: C, at least 1.
        normalization: the network's own normalisation of images in [0, 1].
        options: keyword arguments of the registered builder, JSON-able.
        image_size: side in pixels to which the network first resizes images; None for no resizing.
        projection: D of a teacher whose classifier replaces the network's own: a projector after the last stage maps to
            this width, see `projection.project`. None for the network itself.

    Raises:
        UserError: when the class count, the image size or the projection is not an integer of at least 1, an option is
            not JSON-able, or the normalisation is no `Normalization`.
    """

    name: str
    num_classes: int
    normalization: Normalization
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    image_size: int | None = None
    projection: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.normalization, Normalization):
            raise UserError(
                f"network {self.name!r}: normalization={self.normalization!r:.60} must be a Normalization; "
                "normalization(NAME) looks one up"
            )
        for key in _OPTIONAL:
            size = getattr(self, key)
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise UserError(f"network {self.name!r}: {key}={size!r} must be an integer >= 1, or null")
        if not isinstance(self.num_classes, int) or isinstance(self.num_classes, bool) or self.num_classes < 1:
            raise UserError(f"network {self.name!r}: num_classes={self.num_classes!r} must be an integer >= 1")
        try:
            # A private copy in JSON form, so that equal options from Python, YAML and JSON compare equal.
            options = json.loads(json.dumps(dict(self.options)))
        except (TypeError, ValueError) as error:
            raise UserError(f"network {self.name!r}: options {self.options!r} are not JSON-able ({error})") from None
        object.__setattr__(self, "options", options)

    def to_dict(self) -> dict[str, Any]:
        """Returns the spec as JSON-able values, without an image size or a projection of None."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in values.items() if key not in _OPTIONAL or value is not None}

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
            raise UserError(f"not a network spec: {values!r:.300} ({type(error).__name__}: {error})") from None
