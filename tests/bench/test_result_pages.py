"""The pages of benchmarks/: what was measured is shown."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts are no part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


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
