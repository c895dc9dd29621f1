"""Names of networks, and how a network is built from its spec."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.networks.spec import NetworkSpec
from ekd_lightning.networks.staged import StagedNetwork

Builder = Callable[..., StagedNetwork]
BuilderT = TypeVar("BuilderT", bound=Builder)

_BUILDERS: dict[str, Builder] = {}


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
