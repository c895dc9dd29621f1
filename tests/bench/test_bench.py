"""`ekd-bench`: turns are taken fairly, the plain side computes the same loss, and every number is written."""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from whole_runs import TINY

from ekd_lightning.bench import measurements, summary, take_turns
from ekd_lightning.bench.cost import GROUPS, _output_of, by_group, load_cached, load_plain, step_profile, write_folder
from ekd_lightning.bench.ours import BareLoop
from ekd_lightning.bench.page import page
from ekd_lightning.bench.parts import Bench, agreement, careful_epoch, sweep
from ekd_lightning.bench.plain import CarefulLoop, PilImages, PlainLoop, loader_rate
from ekd_lightning.cli.bench import PARTS, main
from ekd_lightning.data import load_dataset
from ekd_lightning.errors import UserError
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.training.pool import gather_teachers

CPU = torch.device("cpu")


def test_ways_take_turns_and_the_warm_up_does_not_count():
    asked = []

    def way(name, rates):
        values = iter(rates)
        return lambda: asked.append(name) or next(values)

    rates = take_turns({"one": way("one", [9, 2, 4, 6]), "two": way("two", [9, 4, 2, 24])}, rounds=3)
    assert asked == ["one", "two"] * 4
    assert rates == {"one": [2, 4, 6], "two": [4, 2, 24]}
    found = summary(rates, "one")
    assert found["two"] == {"median": 4, "min": 2, "max": 24, "ratio": 2.0}  # ratios 2, 0.5, 4
    assert found["one"]["ratio"] == 1.0


def test_an_interrupt_ends_a_measurement_with_all_its_processes(monkeypatch, tmp_path):
    held = tmp_path / "held"
    os.mkfifo(held)
    waits = f"import signal; file = open({str(held)!r}, 'w'); file.write('x'); file.flush(); signal.pause()"
    starts = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"

    def interrupted(process):
        with held.open() as file:
            assert file.read(1) == "x"  # the second process runs
            raise KeyboardInterrupt

    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _output_of([sys.executable, "-c", starts, waits])
    assert select.select([reader], [], [], 60)[0]
    assert os.read(reader, 1) == b""  # the end: nobody holds it open for writing any more
    os.close(reader)


def test_pil_images_are_the_images_when_nothing_moves():
    images = load_dataset("digits", "unused").train
    plain = PilImages(images, torch.tensor([5, 0]))
    plain._transform.transforms = plain._transform.transforms[2:]  # neither crop nor flip
    image, label = plain[0]
    assert torch.equal(image, images.images[5].float() / 255)
    assert label == int(images.labels[5])


def test_a_loader_of_a_single_batch_has_a_rate():
    assert loader_rate(load_dataset("digits", "unused").train, torch.arange(8), 8, 5, workers=0) > 0


def test_a_loader_without_a_whole_batch_is_refused():
    with pytest.raises(UserError, match=r"recipe\.batch_size=8 is larger than the 7 training images"):
        loader_rate(load_dataset("digits", "unused").train, torch.arange(7), 8, 5, workers=0)


def test_agreement_by_hand():
    plain, fast = torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    found = agreement(plain, fast, temperature=1.0)
    assert found["top1_agreement"] == 0.5
    assert found["max_log_prob_difference"] == pytest.approx(1.0)  # log-odds 1 against -1


def test_a_folder_is_loaded_either_way(bench, tmp_path):
    write_folder(replace(bench, folder_images=40), tmp_path / "images")
    assert len(list((tmp_path / "images").glob("*/*.jpg"))) == 40
    assert load_plain(str(tmp_path / "images"), "0") > 0
    for _ in ("cold", "warm"):
        assert load_cached(str(tmp_path / "images"), str(tmp_path / "cache")) > 0
    (pixels,) = (tmp_path / "cache").glob("*.pixels")
    assert pixels.stat().st_size == 40 * 3 * 64 * 64


@pytest.fixture
def bench(tiny_settings):
    settings = tiny_settings("teachers.table=auto", "teachers.precision=float32", "teachers.compile=never")
    prepared = prepare(settings, "cpu")
    return Bench(settings, prepared.dataset, gather_teachers(prepared.teachers), CPU, 1, 2, (0,))


def test_the_bare_loop_ends_with_the_weights_of_lightning(bench, tmp_path):
    """What is compared is the same training: only Lightning lies between. Here no graph is recorded."""
    job = bench.job().with_store(tmp_path)
    fitted, bare = job.fit(), BareLoop(job)
    assert fitted.images_per_second > 0
    assert bare.images_per_second(1) > 0
    assert bare.num_graphs == 0
    for name, value in fitted.module.student.state_dict().items():
        torch.testing.assert_close(bare.student.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_both_sides_compute_the_same_loss(bench):
    """One step of the plain loop on one batch, against the bare loop's method on the same images."""
    job = bench.job()
    plain, bare = PlainLoop(job, 0), BareLoop(job)
    images, labels = next(iter(plain.loader))
    with torch.no_grad():
        taught = plain.teachers(images)
        mine = bare.method(bare.student.outputs(images), taught, _batch(images, labels), epoch=0)
        other = plain.method(plain.student.outputs(images), taught, _batch(images, labels), epoch=0)
    torch.testing.assert_close(mine.total, other.total, rtol=1e-4, atol=1e-4)


def test_the_careful_loop_computes_the_same_loss_in_bfloat16(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    plain, careful = PlainLoop(bench.job(), 0), CarefulLoop(bench.job(), 0)
    images, labels = next(iter(plain.loader))
    with torch.no_grad():
        expected = plain.loss(_batch(images, labels))
        found = careful.loss(_batch(images.contiguous(memory_format=torch.channels_last), labels))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    before = [parameter.clone() for parameter in careful.student.parameters()]
    careful.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, careful.student.parameters(), strict=True))


def test_the_plain_loop_gives_terms_the_stages_that_they_read(tiny_settings):
    settings = tiny_settings("method=camkd")
    prepared = prepare(settings, "cpu")
    bench = Bench(settings, prepared.dataset, gather_teachers(prepared.teachers), CPU, 1, 2, (0,))
    loop = PlainLoop(bench.job(), 0)
    assert loop.method.teacher_stages == ("stage3",)
    loop.step()


def test_what_begins_after_the_deadline_is_left_out(bench, monkeypatch):
    built = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: built.append(function) or function)
    settings = replace(bench.settings, teachers=replace(bench.settings.teachers, compile="auto"))
    late = replace(bench, settings=settings, deadline=0.0)
    assert not late.has_time()
    assert bench.has_time(1e9)
    rates, told = careful_epoch(late, late.job(), PlainLoop(late.job(), 0))
    assert set(rates) == set(told) == {"careful plain"}  # graphs need a GPU
    assert bench.settings.teachers.compile == "never"
    assert careful_epoch(bench, bench.job(), PlainLoop(bench.job(), 0)) == ({}, {})


def _batch(images, labels):
    from ekd_lightning.data.loader import Batch

    return Batch(images, labels, torch.zeros_like(labels), torch.zeros_like(labels), torch.ones_like(labels).bool())


def test_the_default_method_alone_is_replaced_and_all_parts_know(tmp_path, store):
    """A method that an experiment chooses stays."""
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /method: kd_mean\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    words = [f"teachers.store={store}", *(word for word in TINY if not word.startswith("method="))]
    found = measurements.make_bench(words, epochs=1, minutes=None)
    assert (found.settings.method.name, found.overrides) == ("ekd_pooled", ("method=ekd_pooled", *words))
    words = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine", *words]
    found = measurements.make_bench(words, epochs=1, minutes=None)
    assert (found.settings.method.name, found.overrides) == ("kd_mean", tuple(words))


def test_the_command_writes_every_part(tmp_path, store, capsys):
    output = tmp_path / "bench.json"
    words = [*TINY, f"teachers.store={store}", "teachers.compile=never"]
    options = ["--parts", "acdi", "--rounds", "1", "--plain-steps", "2", "--sweep-epochs", "2"]
    main([*options, "--output", str(output), *words])
    found = json.loads(output.read_text())
    assert output.with_suffix(".md").read_text() == page(found, PARTS, output.name)
    assert {"origin", "a", "c", "d", "i"} <= set(found)
    assert found["d"]["epochs"] == found["i"]["epochs"] == 2
    assert found["d"]["jobs"] == 6  # two teachers, three numbers of branches
    assert set(found["c"]["rates"]) == {"plain", "cold table", "warm table", "bare loop, warm table"}
    out = capsys.readouterr().out
    assert "warm table" in out
    assert "(d)" in out
    *_, heading, following = out.splitlines()
    assert (heading, shlex.split(following)) == ("next:", ["ekd-train", *words])


def test_parts_without_time_are_the_next_command(monkeypatch, capsys, tmp_path):
    late = SimpleNamespace(device=CPU, began=0.0, overrides=(), has_time=lambda: False)
    monkeypatch.setattr(measurements, "make_bench", lambda *_, **__: late)
    main(["--parts", "ga", "seed=1"])
    assert capsys.readouterr().out.splitlines()[-2:] == ["  ekd-bench --parts ag seed=1", "  ekd-train seed=1"]
    output = ["--output", f"{tmp_path}/b.json"]
    main(["--parts", "ga", "--minutes", "1", "--epochs", "2", "--sweep-fraction", "0.5", *output])
    options = f"--epochs 2 --sweep-fraction 0.5 --output {tmp_path}/b_rest.json"
    assert capsys.readouterr().out.splitlines()[-2:] == [f"  ekd-bench --parts ag {options}", "  ekd-train"]


@pytest.mark.slow
def test_the_slower_parts(tmp_path, store):
    output = tmp_path / "bench.json"
    words = [*TINY, f"teachers.store={store}"]
    options = ["--parts", "beghfl", "--rounds", "1", "--plain-steps", "2", "--folder-images", "40"]
    main([*options, "--output", str(output), *words])
    found = json.loads(output.read_text())
    for row in found["b"]["teachers"].values():
        assert row["top1_agreement"] > 0.95
    assert set(found["e"]["batches"]) == {"1", "128"}
    assert 0.1 < found["f"]["run_gb"] < 20
    assert set(found["l"]["rates"]) == set(found["l"]["memory_gb"]) >= {"cold cache", "warm cache", found["l"]["best"]}
    assert found["l"]["rates"][found["l"]["best"]]["ratio"] == 1
    assert 0 < found["h"]["student_training"] < 1


@pytest.mark.parametrize("name", ["speed", "speed_avx512_bf16", "loading"])
def test_the_pages_of_the_documentation_are_those_of_their_numbers(name):
    file = Path(__file__).parents[2] / f"docs/results/{name}.json"
    found = json.loads(file.read_text())
    text = page(found, PARTS, file.name)
    assert file.with_suffix(".md").read_text() == text
    for key, row in [*found.get("c", {}).get("rates", {}).items(), *found.get("l", {}).get("rates", {}).items()]:
        rates = " | ".join(f"{row[field]:,.0f}" for field in ("median", "min", "max"))
        assert f"\n| {key} | {rates} | {row['ratio']:.2f} |\n" in text
    assert ("plain loop" in text) == (found.keys() & PARTS.keys() != {"l"})


@pytest.mark.parametrize("words", [["--parts", "z"], ["--rounds", "0"], ["--output", "bench.md"]])
def test_impossible_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_users_mistake_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--parts", "a", "student.network=resnt8"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ekd-bench: error: ")
    assert "did you mean 'resnet8'" in line


@pytest.mark.parametrize(
    ("word", "named"), [("recipe.mixup=0.2", "does not mix"), ("method=ce", "needs a method with teachers")]
)
def test_what_the_plain_loop_cannot_do_is_refused(tmp_path, store, capsys, word, named):
    with pytest.raises(SystemExit) as stop:
        main(["--parts", "a", *TINY, f"teachers.store={store}", word])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_every_operator_is_in_one_group():
    times = {
        "aten::convolution_backward": 5.0,
        "aten::mkldnn_convolution": 2.0,
        "## Call CompiledFxGraph fabc": 1.0,
        "aten::_fused_sgd_": 1.0,
        "aten::copy_": 1.0,
    }
    assert list(by_group(times, GROUPS).values()) == pytest.approx([0.5, 0.2, 0.1, 0.1, 0.1])
    assert sum(by_group({"x": 0.0}, GROUPS).values()) == 0.0


def test_the_time_of_a_sweep_is_attributed(bench):
    found = sweep(bench)
    parts = [value for name, value in found.items() if name.endswith("_seconds")]
    assert len(parts) == 3
    assert sum(parts) == pytest.approx(found["ours"], rel=0.05)
    assert min(parts) > 0


def test_a_step_profile_names_where_the_time_went(bench):
    found = step_profile(bench)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["rate_of_the_convolutions_alone"] > found["rate"] > 0


def test_a_closed_plain_loop_has_no_workers_left(bench):
    before = set(multiprocessing.active_children())
    loop = PlainLoop(bench.job(), 1)
    loop.step()
    (worker,) = set(multiprocessing.active_children()) - before
    held = loop.loader._iterator  # as a traceback or a debugger may
    loop.close()
    assert not worker.is_alive()
    assert held is not None
