"""Reading the official files, and refusing anything else."""

import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_files import make_tiny, python_bytes

from ekd_lightning.data.cifar import cifar_spec, find_cifar, read_cifar, read_pickled_dict
from ekd_lightning.errors import UserError

NAMES = ["cifar10", "cifar100"]
FORMS = ["binary", "python"]


def check_content(tiny, dataset):
    for image_set, files in ((dataset.train, tiny.spec.binary.train), (dataset.test, tiny.spec.binary.test)):
        parts = [tiny.parts[file.name] for file in files]
        assert np.array_equal(image_set.images.numpy(), np.concatenate([part.pixels for part in parts]))
        assert np.array_equal(image_set.labels.numpy(), np.concatenate([part.labels for part in parts]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_reads_either_form_from_the_root_or_the_folder(name, form, tmp_path):
    tiny = make_tiny(name)
    folder = tiny.write(tmp_path, form)
    for root in (tmp_path, folder):
        dataset = read_cifar(tiny.spec, root)
        check_content(tiny, dataset)
        assert dataset.source == str(folder)
        assert dataset.class_names == tiny.spec.class_names


def test_binary_form_comes_first(tmp_path):
    tiny = make_tiny("cifar10")
    tiny.write(tmp_path, "python")
    folder = tiny.write(tmp_path, "binary")
    found = find_cifar(tiny.spec, tmp_path)
    assert found is not None
    assert found == (folder, tiny.spec.binary)


def test_incomplete_folder_is_named_unless_the_other_form_is_whole(tmp_path):
    tiny = make_tiny("cifar10")
    folder = tiny.write(tmp_path, "binary")
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match=r"cifar-10-batches-bin lacks data_batch_3\.bin: delete the folder, then"):
        read_cifar(tiny.spec, tmp_path)
    tiny.write(tmp_path, "python")
    check_content(tiny, read_cifar(tiny.spec, tmp_path))


def test_missing_data_says_what_where_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        read_cifar(cifar_spec("cifar10"), Path("nothing"))
    message = str(caught.value)
    where = tmp_path / "nothing"
    assert f"looked for cifar-10-batches-bin and cifar-10-batches-py in {where};" in message
    assert f"run `ekd-data cifar10 --root {where}`" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("form", "file", "damage", "message"),
    [
        ("binary", "data_batch_2.bin", lambda data: data[:-5], r"has 12287 bytes instead of 12292: .*ekd-data"),
        ("binary", "data_batch_2.bin", lambda data: data[:99] + b"!" + data[100:], r".*MD5 \w{32} instead of \w{32}"),
        ("python", "data_batch_2", lambda data: data[:99] + b"!" + data[100:], r".*MD5 \w{32} instead of \w{32}"),
    ],
)
def test_truncated_and_altered_files(form, file, damage, message, tmp_path):
    tiny = make_tiny("cifar10")
    path = tiny.write(tmp_path, form) / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{path} {message}"):
        read_cifar(tiny.spec, tmp_path)


def test_class_names_are_the_published_ones(tmp_path):
    tiny = make_tiny("cifar10")
    (tiny.write(tmp_path) / "batches.meta.txt").write_text("\n".join("abcdefghij"))  # has no published MD5
    assert read_cifar(tiny.spec, tmp_path).class_names == tiny.spec.class_names


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_malicious_batch_is_refused_and_not_run(tmp_path):
    """Even with the MD5 table patched to accept the file."""
    tiny = make_tiny("cifar10")
    folder = tiny.write(tmp_path, "python")
    trace = tmp_path / "executed"
    data = pickle.dumps({"data": Attack(trace), "labels": [0]}, 2)
    (folder / "data_batch_4").write_bytes(data)
    with pytest.raises(UserError, match=rf"{folder / 'data_batch_4'} is not .* would load \w+\.system"):
        read_cifar(tiny.accepting("data_batch_4", data), tmp_path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Attack(trace)))
    assert trace.exists(), "the attack itself must work, or the test shows nothing"


@pytest.mark.parametrize("value", [eval, print, getattr, Path, np.load, np.frombuffer, pickle.loads, np.save])
def test_no_other_global_is_loaded(value):
    with pytest.raises(UserError, match="would load"):
        read_pickled_dict(pickle.dumps({"data": value}), Path("batch"))


def test_other_codecs_are_refused():
    harmless = b"\x80\x02}U\x01dc_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86Rs."
    with pytest.raises(UserError, match="codec 'hex'"):
        read_pickled_dict(harmless, Path("batch"))


@pytest.mark.parametrize("data", [b"", b"junk", pickle.dumps([1]), pickle.dumps({"data": 1})[:-3]])
def test_damaged_pickles_are_named(data):
    with pytest.raises(UserError, match="batch"):
        read_pickled_dict(data, Path("batch"))


@pytest.mark.parametrize(
    "content",
    [
        {"labels": [1]},
        {"data": np.zeros((1, 3072), np.uint8)},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
        {"data": np.zeros((1, 3072), np.float32), "labels": [1]},
        {"data": np.zeros((1, 3072), np.uint8), "labels": [10]},
        {"data": np.zeros((1, 3072), np.uint8), "labels": [-1]},
    ],
)
def test_batches_of_another_form_are_refused(content, tmp_path):
    tiny = make_tiny("cifar10")
    folder = tiny.write(tmp_path, "python")
    data = pickle.dumps(content)
    (folder / "test_batch").write_bytes(data)
    with pytest.raises(UserError, match=r"test_batch (lacks 'data' or 'labels'|has labels outside 0\.\.9)"):
        read_cifar(tiny.accepting("test_batch", data), tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_old_and_new_numpy_spellings(protocol, module):
    tiny = make_tiny("cifar10")
    part = tiny.parts["test_batch.bin"]
    data = python_bytes(tiny.spec, part, protocol)
    if protocol < 4:  # later protocols spell the length before the name
        for old in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
            data = data.replace(old, module.encode())
    batch = read_pickled_dict(data, Path("batch"))
    assert np.array_equal(batch["data"], part.pixels.reshape(4, -1))


def test_batches_written_by_python_2():
    """As the official ones are: byte strings, protocol 2, old NumPy."""
    data = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
        b"U\x01b\x87Rq\x05(K\x01K\x01K\x02\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\xff\x80tbU\x06labelsq\x08]q\tK\x06au."
    )
    batch = read_pickled_dict(data, Path("batch"))
    assert batch["data"].tolist() == [[255, 128]]
    assert batch["labels"] == [6]


def test_class_constants():
    for name, first, last, count in (("cifar10", "airplane", "truck", 10), ("cifar100", "apple", "worm", 100)):
        names = cifar_spec(name).class_names
        assert (names[0], names[-1], len(set(names))) == (first, last, count)
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        cifar_spec("cifar-10")


def test_official_lengths():
    for name in NAMES:
        spec = cifar_spec(name)
        assert sum(file.length for file in spec.binary.files) == 60000 * (spec.label_bytes + 3 * 32 * 32)
        assert all(len(file.md5) == 32 for file in spec.binary.files + spec.python.files)
        assert dataclasses.is_dataclass(spec)


@pytest.mark.assets
@pytest.mark.parametrize("name", NAMES)
def test_real_data(name, real_root):
    spec = cifar_spec(name)
    if not (real_root / spec.binary.folder).is_dir():
        pytest.skip(f"no {spec.binary.folder}")
    dataset = read_cifar(spec, real_root)
    per_class = torch.tensor(len(spec.class_names) * [50000 // len(spec.class_names)])
    assert torch.equal(torch.bincount(dataset.train.labels), per_class)
    assert torch.equal(torch.bincount(dataset.test.labels), per_class // 5)
    assert dataset.class_names == spec.class_names
    for image_set, files in ((dataset.train, spec.binary.train), (dataset.test, spec.binary.test)):
        start = 0
        for file in files:  # row by row, channel by channel
            data = (real_root / spec.binary.folder / file.name).read_bytes()
            step = 3072 + spec.label_bytes
            for row in range(0, len(data) // step, 97):
                record = data[row * step : (row + 1) * step]
                assert image_set.labels[start + row] == record[spec.label_bytes - 1]
                for channel in range(3):
                    plane = np.frombuffer(record, np.uint8, 1024, spec.label_bytes + 1024 * channel)
                    ours = image_set.images[start + row, channel].numpy()
                    assert np.array_equal(ours, plane.reshape(32, 32))
            start += len(data) // step
        assert start == len(image_set)
