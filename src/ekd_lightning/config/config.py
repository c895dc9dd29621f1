"""Configuration of a job: from Hydra's composed configuration to typed settings, and back.

Only this module runs code that a configuration names: modules of `imports`, and callbacks by `_target_`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ekd_lightning.config.mistakes import as_typed, config_error
from ekd_lightning.errors import STARTED_IN, UserError, load_plugins, unknown_name
from ekd_lightning.keys import is_path, is_place, keys_where, without_effect
from ekd_lightning.roles import is_of, name_of_type, what_is_allowed
from ekd_lightning.runs.directory import CONFIG, RunDirectory
from ekd_lightning.runs.words import code_of, names_code
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.settings import Settings

if TYPE_CHECKING:
    from pytorch_lightning import Callback

ALLOWED = ("ekd_lightning", "pytorch_lightning.callbacks")
"""Packages whose callbacks a configuration may name, besides the modules of `imports`."""
PLACES = keys_where(is_path)
"""Settings that can be paths of folders."""
TEACHER_PLACES = ("file", "weights", "hub")
"""Keys of a pool entry that can be paths."""
_NO_WEIGHT = re.compile(r"\+{0,2}method\.terms\.(\w+)\.weight=[+-]?(?:0+\.?0*|\.0+)")


def register_schema() -> None:
    """Makes the typed schema known to Hydra as `ekd_schema`; conf/train.yaml starts from it."""
    schema = OmegaConf.structured(Settings)
    # Options of terms and optimisers need no `+` on the command line; unknown ones are refused when these are built.
    for options in (schema.method.terms, schema.recipe.optimizer_options, schema.teachers.recipe.optimizer_options):
        OmegaConf.set_struct(options, False)
    ConfigStore.instance().store(name="ekd_schema", node=schema)


def compose_config(*overrides: str) -> DictConfig:
    """Composes a configuration as `ekd-train` would."""
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides))


def compose_settings(*overrides: str) -> Settings:
    """Composes typed settings as `ekd-train` would, for notebooks and scripts, e.g. from "data.fraction=0.1"."""
    return to_settings(compose_config(*overrides))


def to_settings(cfg: DictConfig) -> Settings:
    """Resolves a composed configuration into typed settings.

    Raises:
        UserError: If a mandatory value (`???`) is missing, a key is unknown, or a value is of another type.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]}: has no default and must be given, {missing[0]}=...")
    settings = OmegaConf.to_object(cfg)
    assert isinstance(settings, Settings)  # the schema is the root of the defaults list
    _check_fields(settings)
    return settings


def _check_fields(settings: Any, prefix: str = "") -> None:
    """Refuses what Hydra does not compare with the schema: keys that `+key=value` added, and lists in lists."""
    known, hints = {item.name: item.metadata for item in fields(settings)}, get_type_hints(type(settings))
    for name, value in vars(settings).items():
        if name not in known:
            raise unknown_name("key", f"{prefix}{name}", (f"{prefix}{other}" for other in known))
        if not is_of(value, hints[name]):
            raise UserError(f"{prefix}{name}={as_typed(value)}: must be {what_is_allowed(hints[name], known[name])}")
        if is_dataclass(value):
            _check_fields(value, f"{prefix}{name}.")


def warn_without_effect(keys: Sequence[str], jobs: Iterable[Settings]) -> None:
    """Warns of settings that the user gave for all jobs (dotted keys) and that have no effect in any of them.

    The settings of the jobs are read only as far as needed.
    """

    def lines(settings: Settings) -> dict[str, str]:
        facts = {}
        if "teachers.count" in keys:  # has an effect only in methods with teachers
            from ekd_lightning.methods import needs_teachers  # noqa: PLC0415 (slow; --help needs none)

            facts["method.name"] = needs_teachers(settings.method.terms)
        return without_effect(settings, keys, facts)

    _warn_of_all(map(lines, jobs))


def warn_of_idle_terms(jobs: Iterable[Sequence[str]], compose: Callable[[Sequence[str]], DictConfig]) -> None:
    """Warns of terms that the overrides of all jobs give the weight 0, and that the method of no job has.

    The jobs are read only as far as needed.
    """
    from ekd_lightning.methods.terms import TERMS  # noqa: PLC0415 (slow; --help and --cfg need none)

    def lines(words: Sequence[str]) -> dict[str, str]:
        given = {word: match[1] for word in words if (match := _NO_WEIGHT.fullmatch(word))}
        if not given:
            return {}
        method = compose([word for word in words if word not in given]).method
        lacks, has = f"has no effect: {method.name} has no term", ", ".join(method.terms)
        return {
            word: f"{word} {lacks} {name}; its terms are {has}"
            for word, name in given.items()
            if name not in method.terms and name in TERMS  # the method refuses other names
        }

    _warn_of_all(map(lines, jobs))


def _warn_of_all(jobs: Iterable[dict[str, str]]) -> None:
    """Warns of what is found in every job, given as lines by their subjects; those of the last job are shown."""
    common: dict[str, str] = {}
    for number, found in enumerate(jobs):
        common = {key: line for key, line in found.items() if number == 0 or key in common}
        if not common:
            return
    for line in common.values():
        warnings.warn(line, stacklevel=3)


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as nested plain containers, for loggers and files."""
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def write_config(plain: dict[str, Any], directory: Path) -> None:
    """Writes the resolved configuration into the run's directory."""
    RunWriter(directory).write_yaml(CONFIG, OmegaConf.to_yaml(OmegaConf.create(plain)))


def read_config(directory: Path, key: str = "") -> dict[str, Any]:
    """Reads a run's configuration, which `write_config` wrote; `key` ("resume=") begins messages on the directory.

    Raises:
        UserError: If the directory holds no run, or the file is damaged.
    """
    if not directory.is_dir():
        raise UserError(f"{key}{directory}: no such directory")
    run = RunDirectory(directory)
    if run.file(CONFIG) is None:
        raise UserError(f"{key}{directory}: not the directory of a run (no {CONFIG})")
    return run.config()


def recorded_settings(run: RunDirectory, overrides: Sequence[str] = (), *, trust: bool = False) -> Settings:
    """The settings of a run on disk; imports the modules of its `imports` if the user names them or trusts the record.

    `overrides` are `key=value` for new locations, e.g. `data.root=/data`, and for `imports`. With `trust`, modules that
    only the record names are imported.

    Raises:
        UserError: If the directory holds no run, the file is damaged or of another version, a module cannot be found,
            or only the record names it and `trust` is False.
    """
    config = _where_it_was_started(read_config(run.path), run)
    schema = OmegaConf.structured(Settings)
    try:
        merged = OmegaConf.merge(schema, config)
    except (ValueError, OmegaConfBaseException) as error:
        reason = config_error(error).splitlines()[0]
        raise UserError(f"{run.path / CONFIG}: not a configuration of this version ({reason})") from None
    try:
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise UserError(config_error(error)) from None
    assert isinstance(merged, DictConfig)
    settings = to_settings(merged)
    if (code := code_of(settings)) and not trust and not any(map(names_code, overrides)):
        raise UserError(
            f"{run.path}: its record names code ({' '.join(code)}), which is imported only with your consent: if you "
            f"trust it, add --trust, or {' '.join(code)}"
        )
    import_user_modules(settings.imports)  # they may define the run's student, data set and terms
    return settings


def _where_it_was_started(config: dict[str, Any], run: RunDirectory) -> dict[str, Any]:
    """A run's configuration, its relative paths made absolute if they exist below the directory of its start."""
    start = run.provenance().get("working_directory")
    for group, name in list(_places(config)):
        if isinstance(start, str) and Path(start, group[name]).exists():
            group[name] = str(Path(start, group[name]))
    return config


def _places(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The mappings of a configuration that hold paths, each with the key of the path."""
    for key in PLACES:
        group, _, name = key.partition(".")
        if isinstance(config.get(group), dict) and is_place(key, config[group].get(name)):
            yield config[group], name
    pool = teachers.get("pool") if isinstance(teachers := config.get("teachers"), dict) else None
    for entry in pool if isinstance(pool, list) else []:
        for name in TEACHER_PLACES:
            if isinstance(entry, dict) and isinstance(entry.get(name), str):
                yield entry, name


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values in which two plain configurations differ, old and new, by their dotted keys.

    A setting that the old configuration lacks, as in a record of an earlier version, counts as having its default.
    Paths are not compared, because the content of data and weights is compared by its hash when it is read. Neither is
    the gradient of branches between students without branches, which earlier records lack.
    """
    usual = asdict(Settings())
    found = dict(_changed(old, new, usual, ""))
    if all({**usual["student"], **config.get("student", {})}["branches"] == 1 for config in (old, new)):
        found.pop("student.branch_gradients", None)
    return found


def _changed(old: Any, new: Any, default: Any, prefix: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            usual = default.get(name) if isinstance(default, dict) else None
            before = old.get(name, usual if name in new else None)
            yield from _changed(before, new.get(name), usual, f"{prefix}.{name}".lstrip("."))
    elif old != new and not (is_place(prefix, old) and is_place(prefix, new)):
        yield prefix, (old, new)


def import_user_modules(names: Sequence[str]) -> None:
    """Imports modules that register networks, terms or data sets.

    The directory in which the user called the command is searched first; directories from records are not searched.

    Raises:
        UserError: If a module cannot be found. An error inside a module keeps its traceback.
    """
    load_plugins()
    if not names:
        return
    from ekd_lightning.networks.library import allow_module  # noqa: PLC0415 (slow; --help needs none)

    here = os.environ.get(STARTED_IN) or os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"imports: {name!r} is not the name of a module")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # the module was found, but imports one that is missing
            raise UserError(f"imports: no module {name!r} in {here} or among the installed packages") from None
        allow_module(name)


def build_callbacks(settings: Settings) -> list[Callback]:
    """Builds the callbacks of a configuration, after importing the modules of `imports`; raises as these two do."""
    import_user_modules(settings.imports)
    nodes = {name: node for name, node in settings.callbacks.items() if node}
    return [build_callback(node, f"callbacks.{name}", settings.imports) for name, node in nodes.items()]


def build_callback(node: dict[str, Any], key: str, modules: Sequence[str] = ()) -> Callback:
    """Builds a callback from a node with `_target_` and the class's arguments, which are plain values.

    Its class must be defined, not just imported, in one of the `ALLOWED` packages or of the user's modules.

    Raises:
        UserError: If `_target_` is missing, in another module or no callback, or if it refuses its arguments.
    """
    from pytorch_lightning import Callback  # noqa: PLC0415 (slow; --help needs none)

    arguments = dict(node) if isinstance(node, dict) else {}
    target = arguments.pop("_target_", None)
    if target is None:
        raise UserError(f"{key}: has no _target_, the class of the callback")
    module, _, name = str(target).rpartition(".")
    allowed = (*ALLOWED, *modules)
    if not _is_in(module, allowed):
        raise UserError(f"{key}._target_={target}: must begin with one of {', '.join(allowed)}")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, Callback) and _is_in(found.__module__, allowed)):
        raise UserError(f"{key}._target_={target}: {module} defines no class of Lightning callbacks of this name")
    if unbuilt := [name for name, value in arguments.items() if "_target_" in str(value)]:
        raise UserError(f"{key}.{unbuilt[0]}: contains a _target_; arguments of callbacks must be plain values")
    hints = get_type_hints(found.__init__)
    for name, value in arguments.items():
        if name in hints and not is_of(value, hints[name]):
            raise UserError(f"{key}.{name}={value}: must be {name_of_type(hints[name])}")
    try:
        return found(**arguments)
    except Exception as error:
        raise UserError(f"{key}: {' '.join(str(error).split())}") from None


def _is_in(module: str, packages: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


@contextlib.contextmanager
def as_running(config: DictConfig) -> Iterator[None]:
    """Resolves `${hydra:...}` within the block by a job's configuration, as Hydra does while the job runs."""
    instance = HydraConfig.instance()
    before = instance.cfg
    try:
        instance.set_config(config)
        yield
    finally:
        instance.cfg = before


def resolved(config: DictConfig, key: str) -> str:
    """A value of a configuration, with `${hydra:...}` resolved."""
    with as_running(config):
        return str(OmegaConf.select(config, key))
