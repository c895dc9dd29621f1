"""ekd-data."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ekd_lightning.cli.data import main
from ekd_lightning.data import catalog


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(catalog, "_LOADED", {})


def test_digits(capsys, tmp_path):
    main(["digits", "--root", str(tmp_path)])
    out = capsys.readouterr().out
    for part in ("bundled with scikit-learn", "1,437 for training, 360 for testing, 3×32×32", "10: 0, 1", "sha256"):
        assert part in out
    assert out.endswith(f"\nnext:\n  ekd-train data=digits data.root={tmp_path}\n")
    assert not list(tmp_path.iterdir())


def test_the_suggested_command_reads_the_images_that_were_decoded(capsys, tmp_path):
    for number in range(20):
        folder = tmp_path / "own" / ("owl", "wren")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / f"{number}.png")
    for given, word in (([], "null"), (["--image-size", "6"], "6")):
        main(["folder:own", "--root", str(tmp_path / "own"), "--cache", str(tmp_path / "cache"), *given])
        command = f"  ekd-train data=folder data.name=own data.root={tmp_path / 'own'} data.image_size={word}\n"
        assert capsys.readouterr().out.endswith(command)


def test_own_images(capsys, tmp_path):
    path, cache = tmp_path / "own.npz", tmp_path / "cache"
    np.savez(path, images=np.arange(20 * 48, dtype=np.uint8).reshape(20, 4, 4, 3), labels=np.arange(20) % 2)
    main(["npz", "--root", str(path), "--image-size", "8", "--cache", str(cache)])
    out = capsys.readouterr().out
    assert "16 for training, 4 for testing, 3×8×8" in out
    assert out.endswith(f"  ekd-train data=npz data.root={path} data.image_size=8\n")
    assert len(list(cache.glob("*.pixels"))) == 1
    with pytest.raises(SystemExit):
        main(["torchvision:STL11", "--root", str(tmp_path), "--cache", str(cache)])
    assert "data set of torchvision 'STL11'; did you mean 'STL10'?" in capsys.readouterr().err


def test_users_error_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["digts", "--root", str(tmp_path)])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ekd-data: error: unknown data set 'digts'; did you mean 'digits'?")
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_as_a_module(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "ekd_lightning.cli.data", "nope", "--root", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("ekd-data: error: unknown data set 'nope'")


@pytest.mark.assets
def test_real_cifar(capsys, real_root):
    main(["cifar10", "--root", str(real_root)])
    out = capsys.readouterr().out
    assert str(real_root / "cifar-10-batches-bin") in out
    assert "50,000 for training, 10,000 for testing" in out
