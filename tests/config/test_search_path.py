"""Configuration of the user's own that has the name of a file of the package."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module
from whole_runs import call_train

from ekd_lightning.config.config import compose_settings, register_schema
from ekd_lightning.config.edge import make_parser, run_command
from ekd_lightning.config.internals import initialized, users_files_first

OWN = "name: mine\nterms:\n  ce_ensemble: {weight: 3.0}\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "ekd.yaml").write_text(OWN)
    return tmp_path / "conf"


@pytest.mark.parametrize("words", [["--config-dir", "{}"], ["-cd={}"], ["hydra.searchpath=[file://{}]"]])
def test_a_file_of_the_user_wins_over_one_of_the_package(folder, words):
    words = [word.format(folder) for word in words]
    outcome = call_train("--cfg", "job", "--package", "method", *words, "method=ekd", directory=folder / "run")
    assert outcome.code == 0, outcome.err
    assert "name: mine" in outcome.out
    assert "weight: 3.0" in outcome.out
    assert compose_settings("method=ekd").method.name == "ekd"  # the next command has not got them


def test_it_wins_where_studies_and_sweeps_compose(folder):
    register_schema()
    with initialized(str(folder)):
        assert compose("train", overrides=["method=ekd"]).method.name == "mine"
    word = f"hydra.searchpath=[file://{folder}]"
    with users_files_first([word]), initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        assert compose("train", overrides=["method=ekd", word]).method.name == "mine"
        assert compose("train", overrides=["method=ce"]).method.name == "ce"


def test_it_wins_in_every_trial_of_a_search_wherever_that_works(folder, tmp_path, monkeypatch):
    """As in all that commands with options compose."""
    names: list[str] = []

    def body(args) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        names.append(compose_settings("method=ekd").method.name)

    parser = make_parser("ekd-tune", "", "")
    parser.add_argument("overrides", nargs="*")
    monkeypatch.chdir(folder.parent)
    run_command(parser, body, [f"hydra.searchpath=[{folder.name}]"], level=None)
    assert names == ["mine"]
