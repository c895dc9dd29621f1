"""Internals of Hydra: the only module that imports Hydra's private names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import ClassVar

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ekd_lightning.config.config import resolved


@contextlib.contextmanager
def initialized(config_dir: str | None) -> Iterator[None]:
    """Initialises Hydra with the package's configuration and the user's folder or address, as `--config-dir` does."""
    path = create_config_search_path("pkg://ekd_lightning.conf")
    if config_dir is not None:
        path.prepend("command-line", _address(config_dir), "main")
    Hydra.create_main_hydra2(task_name="train", config_search_path=path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


class _UsersFoldersFirst(SearchPathPlugin):
    """Searches configuration files in the user's folders first, then in the package."""

    folders: ClassVar[list[str]] = []

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(self.folders):
            search_path.prepend("user", folder, "main")


@contextlib.contextmanager
def users_files_first(words: Sequence[str]) -> Iterator[None]:
    """Prefers configuration files in folders that a command line names to the package's files of the same names."""
    if _UsersFoldersFirst not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(_UsersFoldersFirst)
    before, _UsersFoldersFirst.folders = _UsersFoldersFirst.folders, list(_users_folders(words))
    try:
        yield
    finally:
        _UsersFoldersFirst.folders = before
        if not before:
            with contextlib.suppress(ValueError):  # a launcher may have set all plugins anew
                Plugins.instance().plugin_type_to_subclass_list[SearchPathPlugin].remove(_UsersFoldersFirst)


def _users_folders(words: Sequence[str]) -> Iterator[str]:
    """The addresses of folders of `--config-dir` and `hydra.searchpath`, relative ones resolved from here.

    Words that Hydra cannot read are left to its own check.
    """
    for word, following in zip(words, [*words, ""][1:], strict=True):
        key, _, value = word.partition("=")
        if key in ("--config-dir", "-cd") and (folder := value or following):
            yield _address(folder)
        elif key.lstrip("+") == "hydra.searchpath":
            with contextlib.suppress(HydraException):
                found = OverridesParser.create().parse_override(word).value()
                yield from (_address(str(one)) for one in (found if isinstance(found, list) else [found]) if one)


def _address(folder: str) -> str:
    return folder if "://" in folder else f"file://{os.path.abspath(folder)}"


def options_of(group: str) -> list[str]:
    """The options of a configuration group, e.g. the methods of `method`."""
    return GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG)


def keys_set_by(config: str, section: str) -> set[str]:
    """Keys of a section that a configuration file (`method/ekd`) sets, itself or in a file of its defaults list.

    Files of its defaults list are of the same group.
    """
    loader = GlobalHydra.instance().config_loader()
    loaded = loader.repository.load_config(config)  # type: ignore[attr-defined]
    if loaded is None:
        return set()
    found = {f"{section}.{key}" for key in loaded.config.get(section) or {}}
    group = config.rpartition("/")[0]
    for parent in loaded.defaults_list or []:
        name = getattr(parent, "path", None)
        if name and name != "_self_":
            found |= keys_set_by(f"{group}/{name}", section)
    return found


def hide_from_help(group: str) -> None:
    """Leaves a configuration group, which no command line can choose, out of `--help`."""
    shown = Hydra.format_config_groups

    def others(self: Hydra, predicate: Callable[[str], bool], compact: bool = True) -> str:
        return shown(self, lambda name: name != group and predicate(name), compact)

    Hydra.format_config_groups = others  # type: ignore[method-assign]


def option_names() -> list[str]:
    """The command-line options of Hydra, with their dashes."""
    return list(get_args_parser()._option_string_actions)


def parse_override(word: str) -> Override:
    """Parses an override by Hydra's grammar; raises OverrideParseException if it does not follow it."""
    return OverridesParser.create().parse_override(word)


def with_absolute(word: str, keys: Collection[str]) -> str:
    """An override of a list of mappings, its relative paths below `keys` made absolute if they exist.

    Raises:
        OverrideParseException: If it does not follow the grammar.
    """
    parsed = parse_override(word)
    for entry in parsed._value if isinstance(parsed._value, list) else []:
        for key, value in entry.items() if isinstance(entry, dict) else ():
            path = value.text if isinstance(value, QuotedString) else value
            if key in keys and isinstance(path, str) and os.path.exists(path):
                entry[key] = QuotedString(os.path.abspath(path), Quote.single)
    return f"{word.partition('=')[0]}={parsed.get_value_element_as_str()}"


def sweep_jobs(config: DictConfig) -> list[tuple[str, list[str]]] | None:
    """The jobs that Hydra's own sweeper is going to start for a composed multirun.

    Returns:
        For each job its directory below the sweep's and its overrides; None for another sweeper, which chooses its
        jobs while it runs.
    """
    hydra = config.hydra
    if not str(hydra.sweeper._target_).endswith(".BasicSweeper"):
        return None
    varied = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    loader = GlobalHydra.instance().config_loader()
    words = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # each job resolves `${seed}` itself
    assert isinstance(words, list)
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*varied, *words])
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    plain = OmegaConf.to_container(hydra.sweep, resolve=False)
    assert isinstance(plain, dict)
    if plain["subdir"] == "${hydra.job.num}":
        return [(str(number), list(job)) for number, job in enumerate(jobs)]
    return [(_subdirectory(config, job, number), list(job)) for number, job in enumerate(jobs)]


def job_config(config: DictConfig, overrides: Sequence[str], number: int) -> DictConfig:
    """The configuration of a job of a composed multirun, as the launcher composes it; both with the node `hydra`."""
    job = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.num = number
        job.hydra.job.id = str(number)
    return job


def _subdirectory(config: DictConfig, overrides: Sequence[str], number: int) -> str:
    """The directory of a job below the sweep's, as the launcher will resolve it."""
    try:
        return resolved(job_config(config, overrides, number), "hydra.sweep.subdir")
    except (HydraException, OmegaConfBaseException, ValueError, TypeError):  # the check of all jobs tells its mistake
        return str(number)


@contextlib.contextmanager
def composed_before() -> Iterator[None]:
    """Keeps Hydra's own sweeper, within the block, from composing all jobs once more before it starts them."""
    checks = BasicSweeper.validate_batch_is_legal
    BasicSweeper.validate_batch_is_legal = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        BasicSweeper.validate_batch_is_legal = checks  # type: ignore[method-assign]


def launch(config: DictConfig, jobs: Sequence[Sequence[str]], task: TaskFunction) -> None:
    """Runs jobs, each given by its overrides, with the launcher of a composed multirun.

    All jobs run at once, or `hydra.sweeper.max_batch_size` at a time.
    """
    loader = GlobalHydra.instance().config_loader()
    context = HydraContext(config_loader=loader, callbacks=Callbacks(config))
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
    most = config.hydra.sweeper.get("max_batch_size") or len(jobs) or 1
    for start in range(0, len(jobs), most):
        launcher.launch(jobs[start : start + most], initial_job_idx=start)
