"""The pages of benchmarks/: machines are told apart; searches are fair."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import entry, result

from ekd_lightning.reporting.blocks import block_of_rows
from ekd_lightning.studies.comparison import study_rows


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts are no part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_a_page_says_which_rows_are_of_the_other_machine() -> None:
    parts = importlib.import_module("page_parts")

    def made_on(**machines: list[str]) -> str:
        runs = {
            row: [entry(result(row, seed, machine=where)) for seed, where in enumerate(own)]
            for row, own in machines.items()
        }
        return str(parts.made_on(study_rows(block_of_rows("cifar10", 0.1, runs))))

    assert made_on(ce=["here", "here"], kd_mean=["here", "there"]).startswith("here; there for `kd_mean` seed 1, so")
    assert made_on(ce=["here", "here"], kd_mean=["here"]) == "here"


def test_the_page_of_loading_shows_rates_and_memory_of_every_way() -> None:
    page = importlib.import_module("speed_page").page
    rates = {
        name: {"median": rate, "min": rate - 1, "max": rate + 1, "ratio": rate / 200}
        for name, rate in {"ImageFolder, 2 workers": 200.0, "cold cache": 100.0, "warm cache": 5000.0}.items()
    }
    hardware = {"cpu": "a processor", "cpu_count": 2, "cpu_capability": "AVX2", "gpus": []}
    packages = {"torch": "2.0", "pytorch-lightning": "2.5"}
    found = {
        "origin": {"hardware": hardware, "packages": packages, "git": {"commit": "abcdefgh"}},
        "settings": "data=cifar10",
        "rounds": 3,
        "l": {
            "images": 50_000,
            "best": "ImageFolder, 2 workers",
            "rates": rates,
            "memory_gb": dict.fromkeys(rates, 0.756),
        },
    }
    text = page(found, "loading")
    assert text.startswith("# Loading a folder of images\n")
    assert "| warm cache | 5,000 | 4,999 – 5,001 | 25.00 | 0.76 | 10 |" in text
    assert "| cold cache | 100 | 99 – 101 | 0.50 | 0.76 | 500 |" in text
    assert "plain loop" not in text
    both = page({**found, "f": {"run_gb": 1.5}}, "speed")
    assert both.startswith("# Speed compared with a plain PyTorch loop\n")
    assert "| warm cache | 5,000" in both


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trials": 6}, "kd_mean: 6 of 7 trials"),
        ({"trials": 9, "budget": 9}, "searched with other budget"),
        ({"validation_images": 5}, "searched with other validation_images"),
        ({"protocol": {"data": "cifar10", "fraction": 0.1, "subset_sha256": "x", "epochs": 2}}, "other epochs"),
    ],
)
def test_searches_of_other_budgets_make_no_page(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    page = importlib.import_module("equal_macs_page")
    protocol = {"data": "cifar10", "fraction": 0.1, "subset_sha256": "x", "epochs": 1}
    found = {"trials": 7, "budget": 7, "seeds": [0], "validation_images": 4, "protocol": protocol}
    (tmp_path / "ekd.yaml").write_text(yaml.safe_dump(found))
    (tmp_path / "kd_mean.yaml").write_text(yaml.safe_dump(found))
    assert [t["row"] for t in page.tuned(tmp_path)] == ["ekd", "kd_mean"]
    (tmp_path / "kd_mean.yaml").write_text(yaml.safe_dump({**found, **change}))
    with pytest.raises(ValueError, match=words):
        page.tuned(tmp_path)
