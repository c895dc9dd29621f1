"""What a user reads in place of Hydra's and OmegaConf's words: key, value, and what is allowed."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from whole_runs import call_teach, call_train, called

from ekd_lightning.cli import bench, compare, tune
from ekd_lightning.config.config import recorded_settings, register_schema, to_settings
from ekd_lightning.config.mistakes import config_error, line_of
from ekd_lightning.errors import UserError
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.settings import Settings


def line(*words: str) -> str:
    """The line on a mistake in overrides."""
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        try:
            to_settings(compose("train", overrides=list(words)))
        except (HydraException, OmegaConfBaseException) as error:
            return config_error(error)
        except (UserError, AssertionError, TypeError, ValueError, yaml.YAMLError) as error:
            return line_of(error, words) or "a bug"
    return "no mistake"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("recipe.epochs=abc", "recipe.epochs=abc: must be int, at least 1"),
        ("recipe.epochs=1e2", "recipe.epochs=1e2: must be int, at least 1"),
        ("recipe={epochs: x}", "recipe.epochs=x: must be int, at least 1"),
        ("recipe.epochs=${data.name}", "recipe.epochs=digits (from ${data.name}): must be int, at least 1"),
        ("+recipe.epochs=3", "+recipe.epochs=3: there is such a key already; type it without the +"),
        ("++recipe.epochs=x", "recipe.epochs=x: must be int, at least 1"),
        ("~recipe.epochs", "~recipe.epochs: a setting cannot be removed, only set"),
        ("recipe.lr=", "recipe.lr='': must be float, positive"),
        ("recipe.schedule=[1]", "recipe.schedule=[1]: must be one of cosine, step, constant"),
        ("recipe.milestones=3", "recipe.milestones=3: must be a list of float"),
        ("recipe.milestones=[0.5,x]", "recipe.milestones[1]=x: must be float"),
        ("recipe.milestones=[[0.5]]", "recipe.milestones=[[0.5]]: must be a list of float"),
        ("data.fraction=[1]", "data.fraction=[1]: must be float, in (0, 1], or null"),
        ("data={fraction: [1, {a: false}]}", "data.fraction=[1, {a: false}]: must be float, in (0, 1], or null"),
        ("data.padding=x", "data.padding=x: must be int from 0 to 1024 or null"),
        ("data.flip=maybe", "data.flip=maybe: must be true or false"),
        ("data.source=[folder]", "data.source=[folder]: must be text or null"),
        ("seed=null", "seed=null: must be int, at least 0"),
        ("tags={a: 1}", "tags={a: 1}: must be a list of text"),
        ("tags=[[1]]", "tags=[[1]]: must be a list of text"),
        ("student.options=4", "student.options=4: must be a mapping"),
        ("method.chain=3", "method.chain=3: must be a mapping with keys of recipe, temperature, ce_weight, kd_weight"),
        ("hydra.job.chdir=maybe", "hydra.job.chdir=maybe: must be true or false or null"),
        ("trainer=[1]", "trainer=[1]: a configuration group takes the name of one of its options, see --help"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_is_allowed(word, told):
    assert line(word) == told


def numbers(settings: type, prefix: str = ""):
    """Dotted keys of all settings that hold a number or a truth value."""
    for one, hint in zip(fields(settings), get_type_hints(settings).values(), strict=True):
        if is_dataclass(hint):
            yield from numbers(hint, f"{prefix}{one.name}.")
        elif hint in (int, float, bool, int | None, float | None):
            yield f"{prefix}{one.name}"


@pytest.mark.parametrize("key", list(numbers(Settings)))
def test_every_number_says_what_it_may_be(key):
    assert line(f"{key}=abc").startswith(f"{key}=abc: must be ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("recipe: {epochs: abc}", "recipe/mine.yaml: recipe.epochs=abc: must be int, at least 1"),
        ("recipe: {milestones: [x]}", "recipe/mine.yaml: recipe.milestones[0]=x: must be float"),
        ("recipe: {milestones: {a: 1}}", "recipe/mine.yaml: recipe.milestones={a: 1}: must be a list"),
        ("method: {terms: [ce_branch]}", "recipe/mine.yaml: method.terms=[ce_branch]: must be a mapping"),
        ("method: {terms: null}", "recipe/mine.yaml: method.terms=null: must be a mapping"),
        ("tags: {a: 1}", "recipe/mine.yaml: tags={a: 1}: must be a list"),
        ("recipe: true", "recipe/mine.yaml: recipe=true: must be a mapping; the defaults list names options of groups"),
        ("[a]", "recipe/mine.yaml: the file is a list and must be a mapping"),
        ("recipe: 3", "recipe/mine.yaml: recipe=3: must be a mapping; the defaults list names options of groups, "),
        ("evaluation: none", "recipe/mine.yaml: evaluation=none: must be a mapping; the defaults list names options "),
        ("recipe: {epoch: 3}", "recipe/mine.yaml: unknown key 'recipe.epoch'; did you mean 'recipe.epochs'?"),
        ("recipe: {a", "recipe/mine.yaml: not YAML: expected ',' or '}', but got '<stream end>' (line 2, column 11)"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, told):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    found = line(f"hydra.searchpath=[file://{tmp_path}]", "recipe=mine")
    assert found.removeprefix(f"{tmp_path}/").startswith(told)


@pytest.mark.parametrize(
    ("defaults", "found"),
    [
        ("[override /method: 3]", "a file's defaults list holds int"),
        ("[3]", "a file's defaults list holds int"),
        ("[override /method: {a: 1}]", "a file's defaults list holds dict"),
        ("3", "experiment/mine.yaml: defaults is no list, but int"),
        ("kd", "experiment/mine.yaml: defaults is no list, but str"),
        ("null", "experiment/mine.yaml: defaults is no list, but NoneType"),
        ("{a: b}", "experiment/mine.yaml: defaults is no list, but mapping"),
        ("[{a: b, c: d}]", "experiment/mine.yaml: {'a': 'b', 'c': 'd'} is no item of a defaults list"),
        ("[{}]", "experiment/mine.yaml: {} is no item of a defaults list"),
        ("[{3: a}]", "a file's defaults list has an item of another form"),
        ("[{'': x}]", "a file's defaults list has an item of another form"),
    ],
)
def test_a_defaults_list_that_names_no_option_is_one_line(tmp_path, defaults, found):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\ndefaults: {defaults}\n")
    told = f"{found}; the defaults list names options of groups, e.g. `defaults: [override /method: ekd]`"
    assert line(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine") == told


def test_a_defaults_list_that_names_a_missing_file_is_one_line_without_the_search_path(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults: [nothing]\n")
    told = "In 'experiment/mine': Could not load 'experiment/nothing'."
    assert line(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine") == told


def test_a_group_that_a_file_sets_to_a_number_needs_no_override_as_subject():
    told = "a configuration group takes the name of one of its options, see --help"
    assert line_of(ValueError("Config group override must be a string or a list. Got int"), ["seed=1"]) == told


@pytest.mark.parametrize("call", [call_train, call_teach])
def test_commands_of_hydra_end_with_this_line(call, tmp_path):
    outcome = call("recipe.lr=high", directory=tmp_path / "run")
    assert outcome.code == 2
    assert outcome.err.endswith(": error: recipe.lr=high: must be float, positive\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (compare.main, ("--methods", "ce", "--output", "{}/study")),
        (tune.main, ("--output", "{}/tuned")),
        (bench.main, ("--parts", "a")),
    ],
)
def test_so_do_the_other_commands(main, words, tmp_path):
    code, _, err = called(main, *(word.format(tmp_path) for word in words), "recipe.lr=high")
    assert code == 2
    assert err.splitlines()[-1].endswith(": error: recipe.lr=high: must be float, positive")


def test_so_do_records_and_what_is_given_with_them(tmp_path):
    run = RunDirectory(tmp_path)
    (tmp_path / "config.yaml").write_text("recipe: {lr: 1.0}")
    with pytest.raises(UserError, match=r"^data\.download=maybe: must be true or false$"):
        recorded_settings(run, ["data.download=maybe"])
    (tmp_path / "config.yaml").write_text("recipe: {lr: high}")
    told = r"config\.yaml: not a configuration of this version \(recipe\.lr=high: must be float, positive\)$"
    with pytest.raises(UserError, match=told):
        recorded_settings(run)
