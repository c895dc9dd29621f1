"""Every method trains on real CIFAR-10 images, in one process and in two."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from every_method import run_all

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
METHODS = sorted(path.stem for path in CONF.glob("*.yaml"))
STEPS = 6
BETWEEN_PROCESSES = ["bss", "crd", "dml", "ekd", "ekd_random"]
"""Methods whose terms draw, remember, or search: what two processes may do differently."""

pytestmark = [
    pytest.mark.assets,
    pytest.mark.skipif(
        not (os.environ.get("EKD_DATA_ROOT") and os.environ.get("EKD_WEIGHTS_DIR")),
        reason="EKD_DATA_ROOT and EKD_WEIGHTS_DIR name no real images and weights",
    ),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Tables, assistants and test scores of teachers, shared by all runs."""
    return tmp_path_factory.mktemp("store")


def check(folder: Path, devices: int) -> dict:
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["num_devices"]) == (STEPS // devices * devices, devices)
    assert math.isfinite(result["test_nll"])
    rows = (folder / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    terms = yaml.safe_load((CONF / f"{folder.name}.yaml").read_text()).get("terms", {})
    active = [name for name, term in terms.items() if term["weight"] > 0]
    assert {f"train/{name}" for name in active} <= set(header)
    return result


@pytest.mark.parametrize("name", METHODS)
def test_in_one_process(name, shared, tmp_path):
    assert run_all(tmp_path, shared, 1, [name]) == {name: ""}
    result = check(tmp_path / name, 1)
    assert result["num_adapter_parameters"] >= 0
    assert result["num_parameters"] > 0


@pytest.mark.ddp
@pytest.mark.parametrize(
    "methods", [BETWEEN_PROCESSES, pytest.param(METHODS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_in_two_processes(methods, shared, tmp_path):
    """Both processes train the methods one after the other, in one process group."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
    }
    script = Path(__file__).with_name("every_method.py")
    command = [sys.executable, str(script), str(tmp_path), str(shared), "2", *methods]
    processes = [
        subprocess.Popen(
            command,
            env={**common, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)[-8000:]
    for name in methods:
        check(tmp_path / name, 2)
        ranks = [json.loads((tmp_path / name / f"rank{rank}.json").read_text()) for rank in range(2)]
        scores = [{key: value for key, value in rank.items() if key.startswith(("test_", "val_"))} for rank in ranks]
        assert scores[0] == scores[1], name
