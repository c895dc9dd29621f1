"""Paths in overrides: whatever the file system allows comes back as it was, in Hydra, OmegaConf and a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ekd_lightning.config.commands import typed, typed_override
from ekd_lightning.config.overrides import literal, override, read_path

AWKWARD = st.sampled_from("'\"\\$${}[]()=,: ~é\n\t#;%@!*abc0")
ANY = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
NAMES = st.text(AWKWARD | ANY, min_size=1)


@given(NAMES)
@example("${a")
@example("\\${a}\\")
@example('it\'s, "so" = {x}\\')
@example("null")
@example("1e5")
def test_every_path_comes_back(name):
    assert OmegaConf.create({"x": literal(name)}).x == name
    word = override("hydra.run.dir", name)
    assert OmegaConf.create({"x": OverridesParser.create().parse_override(word).value()}).x == name
    assert read_path(word) == name


@given(NAMES)
def test_what_is_printed_can_be_pasted_into_a_shell(name):
    path = Path("/", name)
    (word,) = shlex.split(typed_override("resume", path))
    assert read_path(word) == str(path)
    assert shlex.split(typed(path)) == [str(path)]


def test_names_that_hydra_takes_for_numbers_and_words_are_read_as_typed():
    words = ("2026", "1e5", "true", "0x10", "a b")
    assert [read_path(f"resume={word}") for word in words] == list(words)
    assert [read_path(f"resume={word}") for word in ("", "null")] == [None, None]
