"""Attacks on the store: every file of it damaged, read-only and full disks, and a kill while a table is filled.

What can be made again is made again with the identical result; what cannot is refused by name.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from damages import DAMAGES, LINKS, damage
from safetensors.torch import load_file, save_file
from whole_runs import TINY, Outcome, call_train

from ekd_lightning.data import ImageSet
from ekd_lightning.data.loader import Batch
from ekd_lightning.data.views import CropFlip
from ekd_lightning.errors import UserError
from ekd_lightning.networks import (
    NetworkSpec,
    TeacherEnsemble,
    TeacherIdentity,
    build_network,
    normalization,
    state_sha256,
)
from ekd_lightning.settings import TeacherSettings
from ekd_lightning.teachers.source import TeacherFormat
from ekd_lightning.teachers.store import COST, TeacherStore
from ekd_lightning.teachers.tabled import TabledTeachers

SPEC = NetworkSpec("resnet8", 5, normalization("unit"), {"width": 0.25})
N, VIEWS = 12, CropFlip(padding=1)
PIXELS = torch.randint(0, 256, (N, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
TEST = ImageSet("random", "test", PIXELS, torch.arange(N) % 5, tuple("abcde"))
CPU = torch.device("cpu")


def teacher(seed: int) -> Any:
    torch.manual_seed(seed)
    return build_network(SPEC).eval()


def train(scratch: Path, seed: int = 0) -> Any:
    (scratch / COST).parent.mkdir(parents=True, exist_ok=True)
    (scratch / COST).write_text('{"train_seconds": 7.5, "steps": 3}')
    return teacher(seed)


def batch() -> Batch:
    index = torch.arange(N)
    view = index % VIEWS.num_views
    images = VIEWS(PIXELS.float() / 255, view, index)
    return Batch(images, TEST.labels, index, view, torch.ones(N, dtype=torch.bool))


def tabled(folder: Path, network: Any) -> TabledTeachers:
    identities = [TeacherIdentity("tutor", state_sha256(network), "file", SPEC.name)]
    how = TeacherFormat(precision="float32", compile="never")
    common = {"image_sets": [("b" * 64, N)], "views": VIEWS, "image_size": 8}
    return TabledTeachers(TeacherEnsemble([network], identities), folder, how=how, include_pooled=True, **common)


def answers(store: TeacherStore, seed: int = 0) -> dict[str, Any]:
    """All that runs take from a store: weights and cost of a teacher, its outputs and scores, its rows."""
    network = store.get_or_train({"seed": seed}, lambda scratch: train(scratch, seed))
    sha256 = state_sha256(network)
    said = store.test_outputs(lambda: network, sha256, TEST, 5, CPU)
    source = tabled(store.root / "tables", network)
    rows = source.outputs(batch())
    source.flush()
    return {
        "weights": sha256,
        "cost": store.cost({"seed": seed}),
        "outputs": [part.tolist() for part in said],
        "scores": store.test_scores(network, sha256, TEST, 5, CPU),
        "rows": [rows.logits.tolist(), *(part.tolist() for part in rows.pooled)],
    }


FILES = {
    "weights": "teachers/*/teacher.safetensors",
    "key": "teachers/*/key.json",
    "cost": "teachers/*/cost.json",
    "lock": "teachers/*.lock",
    "outputs": "outputs/*.safetensors",
    "lock of outputs": "outputs/*.lock",
    "rows": "tables/*.rows",
    "description of rows": "tables/*.json",
    "lock of rows": "tables/*.lock",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, tuple[str, str]]]:
    """A store of two teachers, what is taken of the first, and each kind of file: that of the first and another."""
    root = tmp_path_factory.mktemp("whole")
    store, files = TeacherStore(root), {}
    expected = answers(store)
    own = {kind: next(root.glob(pattern)) for kind, pattern in FILES.items() if any(root.glob(pattern))}
    answers(store, seed=1)
    for kind, path in own.items():
        other = next(other for other in root.glob(FILES[kind]) if other != path)
        files[kind] = (str(path.relative_to(root)), str(other.relative_to(root)))
    assert {"weights", "key", "cost", "outputs", "rows", "description of rows"} <= files.keys()
    return root, expected, files


@pytest.mark.filterwarnings("ignore:teacher table")
@pytest.mark.parametrize("kind", FILES)
def test_every_file_in_every_way(tmp_path, whole, kind):
    root, expected, files = whole
    if kind not in files:
        pytest.skip("locks leave no files here")
    locks = "lock" in kind  # which are empty, and matter where something is made
    wrong = []
    for how in LINKS if locks else DAMAGES:
        store = TeacherStore(tmp_path / how.replace(" ", "_").replace("{}", "mapping").replace("[]", "list"))
        shutil.copytree(root, store.root)
        own, other = (store.root / name for name in files[kind])
        damage(how, own, other, Random(f"{kind} {how}"))
        if locks:
            for made in own.parent.glob(f"{own.stem}*"):
                if made != own:
                    shutil.rmtree(made) if made.is_dir() else made.unlink()
        try:
            found = answers(store)
        except UserError as error:
            named = f"{own}: " if kind == "weights" else f"teachers.store={store.root}: " if kind == "lock" else None
            if not named or not str(error).startswith(named) or "\n" in str(error):
                wrong.append(f"{how}: {error}")
            continue
        if kind in ("cost", "weights"):  # is told where it is known, and not where the teacher is trained again
            found["cost"] = found["cost"] or expected["cost"]
        wrong += [f"{how}: other {what}" for what, value in expected.items() if found[what] != value]
    assert not wrong, "\n".join(wrong)


def test_outputs_without_a_checksum_are_believed_only_if_they_can_be_outputs(tmp_path, caplog):
    """Version 0.1 wrote none."""
    store, network = TeacherStore(tmp_path), teacher(0)
    expected = store.test_outputs(lambda: network, "a", TEST, 5, CPU)
    (path,) = (tmp_path / "outputs").glob("*.safetensors")
    good = {name: part.clone() for name, part in expected._asdict().items()}
    nan = good["logits"].clone()
    nan[0, 0] = torch.nan
    for bad in (
        {**good, "logits": nan},
        {**good, "logits": good["logits"].double()},
        {**good, "logits": good["logits"][:-1]},
        {**good, "logits": good["logits"][:, 0].clone()},
        {"logits": good["logits"]},
        {**good, "more": good["logits"].clone()},
    ):
        save_file(bad, path)
        caplog.clear()
        assert all(map(torch.equal, store.test_outputs(lambda: network, "a", TEST, 5, CPU), expected))
        assert [line.startswith(f"{path}: ") for line in caplog.messages] == [True]
    save_file(good, path)
    assert all(map(torch.equal, store.test_outputs(pytest.fail, "a", TEST, 5, CPU), expected))


def test_tables_of_before_are_built_anew(tmp_path):
    """Of version 0.1: their check values say which row, but not of which table, so that two could be swapped."""
    network = teacher(0)
    fresh = tabled(tmp_path, network)
    expected = fresh.outputs(batch())
    fresh.flush()
    (table,) = fresh._stored._tables[0]
    table._sidecar.write_text(json.dumps(table.key.description))
    with pytest.warns(RuntimeWarning, match=f"{table.path.name} does not match its description"):
        old = tabled(tmp_path, network)
    assert torch.equal(old.outputs(batch()).logits, expected.logits)
    assert old.hit_rate == 0.0
    old.flush()
    again = tabled(tmp_path, network)
    assert torch.equal(again.outputs(batch()).logits, expected.logits)
    assert again.hit_rate == 1.0


@pytest.mark.parametrize("value", ["nan", "-1", "-.inf"])
def test_an_impossible_budget_is_refused(value):
    with pytest.raises(UserError, match=r"teachers\.table_budget_gb"):
        TeacherSettings(table_budget_gb=float(value.replace(".", ""))).check()


def test_values_beyond_float16_are_said_once(tmp_path):
    network = teacher(0)
    with torch.no_grad():
        network.head.bias[0], network.head.bias[1] = 1e6, -1e9
    source = tabled(tmp_path, network)
    with pytest.warns(
        RuntimeWarning, match=r"teacher tutor returned outputs up to ±1e\+09: tables clip them at ±65504"
    ):
        first = source.outputs(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.outputs(batch()._replace(view=(batch().view + 1) % VIEWS.num_views))
    assert first.logits[0, :, :2].unique(dim=0).tolist() == [[65504.0, -65504.0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tabled(tmp_path, network).outputs(batch()).logits, first.logits)


# -- whole runs -----------------------------------------------------------------------------------------------------

WORDS = (*TINY, "trainer.limit_train_batches=2", "trainer.threads=1")


def run(folder: Path, store: Path, *words: str) -> Outcome:
    return call_train(*WORDS, f"teachers.store={store}", f"hydra.run.dir={folder}", *words, directory=folder)


def weights(folder: Path) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in load_file(folder / "student.safetensors").items()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store that has all that a run needs, and the run that filled it."""
    root = tmp_path_factory.mktemp("warm")
    outcome = run(root / "run", root / "store")
    assert outcome.code == 0, outcome.err
    return root / "store", root / "run"


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Lets the system refuse all writes below a folder, as for a mount that is read-only; root may chmod."""
    import builtins
    import errno
    import io

    def make(folder: Path) -> None:
        def below(path: Any) -> bool:
            return isinstance(path, (str, Path)) and Path(path).absolute().is_relative_to(folder)

        def refusing(name: str, genuine: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
            def call(path: Any, *rest: Any, **more: Any) -> Any:
                if (below(path) or any(below(p) for p in rest[:1])) and writes(*rest, **more):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
                return genuine(path, *rest, **more)

            return call

        def flags(flags: int = 0, *_: Any, **__: Any) -> bool:
            return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))

        def mode(mode: str = "r", *_: Any, **__: Any) -> bool:
            return bool(set(mode) & set("wax+"))

        monkeypatch.setattr(os, "open", refusing("open", os.open, flags))
        monkeypatch.setattr(io, "open", refusing("open", io.open, mode))
        monkeypatch.setattr(builtins, "open", io.open)
        for name in ("mkdir", "replace", "rename", "unlink", "remove", "rmdir", "truncate", "utime", "link", "symlink"):
            monkeypatch.setattr(os, name, refusing(name, getattr(os, name), lambda *_, **__: True))

    return make


def test_a_warm_store_is_not_written(warm, tmp_path, read_only):
    store, first = warm
    before = content(store)
    read_only(store)
    outcome = run(tmp_path / "run", store)
    assert outcome.code == 0, outcome.err
    assert outcome.result["teacher_table_hit_rate"] == 1.0
    assert "store" not in outcome.err
    assert "cannot be" not in outcome.out
    assert weights(tmp_path / "run") == weights(first)
    assert content(store) == before


def test_a_cold_store_that_cannot_be_written_is_refused_before_training(tmp_path, read_only):
    (tmp_path / "store").mkdir()
    read_only(tmp_path / "store")
    outcome = run(tmp_path / "run", tmp_path / "store")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line == f"ekd-train: error: teachers.store={tmp_path}/store: cannot be written (Read-only file system)"
    assert "training teacher" not in outcome.out


def test_without_room_for_outputs_and_rows_a_run_goes_on_and_says_so_once(warm, tmp_path, read_only):
    """Teachers are there, and nothing else can be kept."""
    store, first = tmp_path / "store", warm[1]
    shutil.copytree(warm[0] / "teachers", store / "teachers")
    read_only(store)
    with pytest.warns(RuntimeWarning, match=f"{store}/tables cannot be kept .*Read-only file system") as caught:
        outcome = run(tmp_path / "run", store)
    assert outcome.code == 0, outcome.err
    assert len([one for one in caught if "cannot be kept" in str(one.message)]) == 1
    assert weights(tmp_path / "run") == weights(first)
    assert not (store / "tables").exists()


def test_a_teacher_that_does_not_fit_on_the_disk_is_one_line(warm, tmp_path, monkeypatch):
    """And the next run goes on from its last epoch, to the identical result."""
    import errno

    genuine = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "teacher.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        genuine(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        outcome = run(tmp_path / "run", tmp_path / "store")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert "teacher.safetensors: cannot be written (No space left on device)" in line
    assert not list((tmp_path / "store").rglob("teacher.safetensors"))
    again = run(tmp_path / "again", tmp_path / "store")
    assert again.code == 0, again.err
    assert weights(tmp_path / "again") == weights(warm[1])
    assert not list((tmp_path / "store").rglob("*.part-*"))


# -- real mounts and kills ------------------------------------------------------------------------------------------

MOUNTED = (
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode
    if shutil.which("unshare")
    else 1
)
needs_mounts = pytest.mark.skipif(MOUNTED != 0, reason="may not mount")


def started(folder: Path, store: Path, mount: str = "true", code: str = "") -> subprocess.CompletedProcess[str]:
    """A run in a process of its own, in which the store may be another mount."""
    script = f"{code}\nfrom ekd_lightning.cli.train import main\nmain()"
    words = [*WORDS, f"teachers.store={store}", f"hydra.run.dir={folder}"]
    shell = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh"] if mount != "true" else []
    return subprocess.run(
        [*shell, sys.executable, "-c", script, *words],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@needs_mounts
def test_a_warm_store_on_a_read_only_mount(warm, tmp_path):
    store, first = warm
    before = content(store)
    mount = f"mount --bind {store} {store} && mount -o remount,ro,bind {store} && ! touch {store}/x 2>/dev/null"
    done = started(tmp_path / "run", store, mount)
    assert done.returncode == 0, done.stderr
    assert "cannot be" not in done.stdout + done.stderr
    assert weights(tmp_path / "run") == weights(first)
    assert content(store) == before


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("room", [0, 64])
def test_a_small_disk(warm, tmp_path, room):
    """Teachers are there, and some kilobytes are left: they run live, as the plan says in one line."""
    store = tmp_path / "store"
    store.mkdir()
    source = warm[0] / "teachers"
    size = sum(-(-path.stat().st_size // 4096) * 4 + 4 for path in source.rglob("*")) + 12 + room
    mount = f"mount -t tmpfs -o size={size}k none {store} && cp -r {source} {store}"
    done = started(tmp_path / "run", store, mount)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count(f"in {store}/tables, but") == 1
    assert run(tmp_path / "live", warm[0], "teachers.table=off").code == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "live")


@pytest.mark.slow
@needs_mounts
def test_a_disk_without_room_for_a_teacher(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    done = started(tmp_path / "run", store, f"mount -t tmpfs -o size=64k none {store}")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("ekd-train: error: ")
    assert str(store / "teachers") in line
    assert "No space left on device" in line
    assert "Traceback" not in done.stderr


KILLING = """
import os, signal
from ekd_lightning.teachers import table
genuine, count = os.pwrite, [0]
def pwrite(handle, content, offset):
    count[0] += 1
    if count[0] == {at}:
        genuine(handle, content[: len(content) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(handle, content, offset)
os.pwrite = pwrite
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:teacher table")
@pytest.mark.parametrize("at", [20, 70, 129])
def test_a_kill_while_a_table_is_filled(warm, tmp_path, at):
    """Half a row, after some: the next run computes what is missing, and its student is the identical one."""
    store = tmp_path / "store"
    shutil.copytree(warm[0] / "teachers", store / "teachers")
    killed = started(tmp_path / "killed", store, code=KILLING.format(at=at))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list((store / "tables").glob("*.rows"))
    again = run(tmp_path / "again", store)
    assert again.code == 0, again.err
    assert weights(tmp_path / "again") == weights(warm[1])
