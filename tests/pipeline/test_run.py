"""What a run refuses under its lock, before anything is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_runs import result, write_run

from ekd_lightning.errors import UserError
from ekd_lightning.pipeline.run import run
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.settings import Settings


def test_a_run_that_another_process_has_ended_meanwhile_is_not_resumed(tmp_path):
    directory = write_run(tmp_path / "run", result(epochs_done=2))
    (directory / "arrays.npz").write_bytes(b"of the evaluation")
    before = {path: path.read_bytes() for path in directory.iterdir()}
    settings = Settings(resume=str(directory))
    settings = replace(settings, recipe=replace(settings.recipe, epochs=2))
    with pytest.raises(UserError, match="nothing to continue"):
        run(settings, directory)
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    assert RunDirectory(directory).record().result is not None
