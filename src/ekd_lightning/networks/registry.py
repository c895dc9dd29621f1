"""Names of networks, and how a network is built from its spec."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.networks.staged import Normalization, StagedNetwork, normalization

Builder = Callable[..., StagedNetwork]
BuilderT = TypeVar("BuilderT", bound=Builder)

_BUILDERS: dict[str, Builder] = {}


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


def register_network(name: str) -> Callable[[BuilderT], BuilderT]:
    """Registers a builder `fn(spec, **options) -> StagedNetwork` under a name.

    The builder's keyword arguments after `spec` are the network's options. It checks their values
    with `require`.

    Raises:
        ValueError: when the name is taken; both builders are named.
    """

    def register(builder: BuilderT) -> BuilderT:
        if name in _BUILDERS:
            raise ValueError(
                f"network {name!r} is already built by {_where(_BUILDERS[name])}; refused: {_where(builder)}"
            )
        _BUILDERS[name] = builder
        return builder

    return register


def network_names() -> tuple[str, ...]:
    """Returns all registered names, sorted."""
    return tuple(sorted(_BUILDERS))


def build_network(spec: NetworkSpec) -> StagedNetwork:
    """Builds a network with fresh weights drawn from PyTorch's global random generator.

    Args:
        spec: which network, for how many classes, with which options.

    Returns:
        The network, in train mode, on the default device.

    Raises:
        UserError: on an unknown name, an unknown option, or a value that the network cannot have.
    """
    if spec.name not in _BUILDERS:
        raise unknown_name("network", spec.name, _BUILDERS)
    builder = _BUILDERS[spec.name]
    allowed = list(inspect.signature(builder).parameters)[1:]
    for option in spec.options:
        if option not in allowed:
            raise unknown_name(f"option of network {spec.name!r}:", option, allowed)
    return builder(spec, **spec.options)


def require(possible: bool, spec: NetworkSpec, option: str, allowed: str) -> None:
    """Refuses an option's value that a network cannot have.

    Args:
        possible: whether the value is fine.
        spec: the spec that holds the value.
        option: the option's name.
        allowed: what would be fine, in words.

    Raises:
        UserError: when not possible.
    """
    if not possible:
        raise UserError(
            f"network {spec.name!r}: option {option}={spec.options.get(option)!r} (allowed: {allowed})"
        )


def is_number(value: object) -> bool:
    """Whether a value is a number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _where(builder: Builder) -> str:
    return f"{getattr(builder, '__module__', '?')}.{getattr(builder, '__qualname__', builder)}"
