"""Networks of timm, torchvision and the user's own modules as staged networks.

Their names are `timm:NAME`, `torchvision:NAME` and `module:PACKAGE.FUNCTION`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ekd_lightning.errors import UserError, one_line, raised, require, unknown_name
from ekd_lightning.files import read_json
from ekd_lightning.networks.cutting import cut
from ekd_lightning.networks.hub import fetch
from ekd_lightning.networks.registry import LIBRARIES
from ekd_lightning.networks.spec import NORMALIZATIONS, NetworkSpec, Normalization
from ekd_lightning.networks.staged import StagedNetwork

PUBLISHED = "DEFAULT"
"""Name of the weights that the library publishes for a network."""
_STAGES = "stages"
"""Option that names stages; all other options are the library's."""
_SIZES = ("img_size", "image_size", "input_size")
"""Options of the libraries that set the input size of a network of fixed size."""
_ANY_SIZE = (("dynamic_img_size", True), ("strict_img_size", False))
"""Options of timm, with their values, that make a network of fixed size accept any size."""
_FILES = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "weights"}
_FILES |= {"weights_backbone", "progress"}
"""Options by which a library would read files. They are refused, because options may come from a record."""
_allowed: set[str] = set()
"""The user's own modules; see `allow_module`."""


@dataclass(frozen=True)
class Published:
    """The configuration that a library publishes for a network.

    Attributes:
        image_size: Side of its images in pixels.
        fixed: Whether the network accepts no other image size.
        num_classes: Number of classes of the published weights.
    """

    normalization: Normalization
    image_size: int
    fixed: bool = False
    num_classes: int = 1000


def from_hub(repository: str) -> tuple[str, Published, Path]:
    """Fetches the config.json and model.safetensors of a timm network from USER/REPO on the Hugging Face hub.

    No other file is fetched. The folder of a copy may be given instead. Returns the network's name with the library's
    prefix, its configuration, and the file of its weights.

    Raises:
        UserError: If a package is missing, the hub or the repository cannot be reached, one of the files is missing, or
            config.json does not describe a timm network.
    """
    copy, files = Path(repository), ("config.json", "model.safetensors")
    config, path = (copy / name if copy.is_dir() else fetch(repository, name) for name in files)
    if missing := [file.name for file in (config, path) if not file.is_file()]:
        raise UserError(f"hub repository {repository!r}: lacks {' and '.join(missing)}")
    description = read_json(config)
    if not isinstance(description.get("architecture"), str):
        raise UserError(f"hub repository {repository!r}: its config.json names no timm architecture")
    name = f"timm:{description['architecture']}"
    own = description.get("pretrained_cfg") or {}
    _timm()
    try:
        found = usual(name)
        assert found is not None
        shape = own.get("input_size") or [3, found.image_size, found.image_size] if isinstance(own, dict) else None
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape):
            raise UserError("lacks a pretrained_cfg with an input_size of three integers above 0")
        statistics = Normalization(own.get("mean", found.normalization.mean), own.get("std", found.normalization.std))
    except UserError as error:
        raise UserError(f"hub repository {repository!r}: its config.json: {error}") from None
    return name, Published(statistics, shape[1], found.fixed), path


def usual(name: str) -> Published | None:
    """Returns the configuration that a library publishes for a network; None for the user's own modules.

    An unknown name, or a library that is not installed, is a `UserError`.
    """
    library, _, own = name.partition(":")
    if library == "timm":
        timm = _timm()
        _require_known(name, own, timm.list_models())
        config = timm.models.get_pretrained_cfg(own) or timm.models.PretrainedCfg()
        _, size, _ = config.input_size
        statistics = Normalization(tuple(config.mean), tuple(config.std))
        return Published(statistics, size, bool(config.fixed_input_size), config.num_classes)
    if library == "torchvision":
        return _usual_of_torchvision(name, own)
    return None


def make_module(name: str, num_classes: int, options: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """Builds a module of a library, initialised by the library.

    Options are keyword arguments of its builder; functions of the user do not get the number of classes. If
    `pretrained`, it has the weights that the library publishes, which are fetched if necessary, with their number of
    classes.

    Raises:
        UserError: For an unknown name or option, a library that is not installed, or weights that cannot be fetched.
    """
    library, _, own = name.partition(":")
    usual(name)  # raises for unknown names
    if refused := sorted(_FILES.intersection(options)) if library != "module" else []:
        raise UserError(f"network {name!r}: option {refused[0]} is refused; weights=FILE reads weights from a file")
    classes = {} if pretrained else {"num_classes": num_classes}
    try:
        if library == "timm":
            return _timm().create_model(own, pretrained=pretrained, **classes, **options)
        if library == "torchvision":
            from torchvision import models  # noqa: PLC0415 (slow to import)

            return models.get_model(own, weights="DEFAULT" if pretrained else None, **classes, **options)
        made = _users_function(name, own)(**options)
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"network {name!r} cannot be built with options {dict(options)} ({one_line(error)})") from None
    except Exception as error:
        if library == "module":
            raise UserError(f"network {name!r}: its function raised {raised(error)}") from error
        if not pretrained:
            raise
        raise UserError(f"network {name!r}: its published weights cannot be fetched ({one_line(error)})") from None
    if not isinstance(made, nn.Module):
        raise UserError(f"network {name!r}: its function returned a {type(made).__name__}, not a torch.nn.Module")
    return made


def build_library_network(spec: NetworkSpec) -> StagedNetwork:
    """Builds a network of a library with new weights, initialised by the library; raises as `make_module` and `cut`."""
    network = as_network(spec, make_module(spec.name, spec.num_classes, own_options(spec)))
    head = network.head
    if isinstance(head, nn.Linear) and head.out_features != spec.num_classes:  # functions do not get num_classes
        network.head = nn.Linear(head.in_features, spec.num_classes)
    return network.train()


def as_network(spec: NetworkSpec, module: nn.Module) -> StagedNetwork:
    """Cuts a module of a library into a staged network; raises as `cut`."""
    size = fixed_size(spec)
    parts = cut(module, size or spec.image_size, spec.options.get(_STAGES))
    return StagedNetwork(spec, parts.stages, parts.num_features, neck=parts.neck, head=parts.head, fixed_size=size)


LIBRARIES.update(dict.fromkeys(("timm", "torchvision", "module"), build_library_network))


def own_options(spec: NetworkSpec) -> dict[str, Any]:
    """Returns the options of a network for the library, which does not know `stages`."""
    return {name: value for name, value in spec.options.items() if name != _STAGES}


def fixed_size(spec: NetworkSpec) -> int | None:
    """Returns the only image size in pixels that a library's network accepts; None for any.

    Raises:
        UserError: For an unknown name, or a library that is not installed.
    """
    known = usual(spec.name)
    if known is None or not known.fixed or any(spec.options.get(name) == any_size for name, any_size in _ANY_SIZE):
        return None
    size = next((spec.options[name] for name in _SIZES if name in spec.options), known.image_size)
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None


def _timm() -> Any:
    require("timm", "timm")
    import timm  # noqa: PLC0415 (slow to import, and optional)

    return timm


def _usual_of_torchvision(name: str, own: str) -> Published:
    from torchvision import models  # noqa: PLC0415 (slow to import)

    _require_known(name, own, models.list_models(module=models))
    weights = models.get_model_weights(own)
    published = getattr(weights, "DEFAULT", None)
    if published is None:
        return Published(NORMALIZATIONS["imagenet"], 224)
    preset = published.transforms()
    smallest = published.meta.get("min_size", (1, 1))
    size = int(preset.crop_size[0])
    # Learned position embeddings fix the size; torchvision shows them only by the names of these families.
    fixed = own.startswith(("vit_", "maxvit"))
    statistics = Normalization(tuple(preset.mean), tuple(preset.std))
    return Published(statistics, max(size, *smallest), fixed, len(published.meta["categories"]))


def _require_known(name: str, own: str, names: Sequence[str]) -> None:
    if own not in names:
        raise unknown_name(f"network of {name.partition(':')[0]}:", own, names)


def allow_module(name: str) -> None:
    """Allows networks `module:NAME.FUNCTION` that call the functions defined in an imported module of the user.

    Call it only for modules that the user's own command or code names, never for a name from a file or a record, since
    a network's options become arguments of the function. See SECURITY.md.
    """
    _allowed.add(name)


def _users_function(name: str, path: str) -> Callable[..., Any]:
    """Finds a function that is defined, not merely imported, in a module that the user has allowed."""
    package, _, function = path.rpartition(".")
    if package not in sys.modules or not _is_allowed(package):
        raise UserError(f"network {name!r}: module {package!r} is not among imports: add imports=[{package}]")
    functions = {
        own: value
        for own, value in vars(sys.modules[package]).items()
        if callable(value) and not own.startswith("_") and _is_allowed(str(getattr(value, "__module__", "")))
    }
    if function not in functions:
        raise unknown_name(f"function of module {package}:", function, functions)
    return functions[function]


def _is_allowed(module: str) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in _allowed)
