"""Chains of assistants on the tiny digits task: teachers of one epoch, two links, a narrow ResNet-8 as student."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from whole_runs import TINY

from ekd_lightning.data.datamodule import ImageDataModule
from ekd_lightning.errors import UserError
from ekd_lightning.networks import build_network, load_network, load_student, state_sha256
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.pipeline.teachers import choose_teacher
from ekd_lightning.teachers.store import COST, TeacherStore
from ekd_lightning.training import chain as room
from ekd_lightning.training.chain import link_terms
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.pool import gather_teachers

LARGE, SMALL = "{network: resnet8, options: {width: 0.75}}", "{network: resnet8, options: {width: 0.5}}"
TWO = f"method.assistants=[{LARGE},{SMALL}]"
ALL = "method.teacher=null"  # both teachers of the pool, by the mean of their logits
WORDS = ("method=takd", ALL, TWO)


def chain_of(settings):
    return prepare(settings, "cpu").chain


def links_of(settings):
    """Trains, or finds, the chain of a run."""
    (identity,) = gather_teachers(prepare(settings, "cpu").teachers).identities
    return identity.detail["chain"]


@pytest.fixture(scope="module")
def two_runs(train, tmp_path_factory):
    """The same run twice: the store lacks the chain, then has it."""
    folder = tmp_path_factory.mktemp("runs")
    outcomes = [train(folder / name, *WORDS) for name in ("first", "second")]
    assert [o.code for o in outcomes] == [0, 0], outcomes[0].err + outcomes[1].err
    return outcomes


# -- the run and its record ------------------------------------------------------------------------------


def test_every_link_is_recorded_and_taught_by_the_one_before(two_runs):
    result = two_runs[0].result
    first, second = result["chain"]
    assert first["teachers"] == result["pool_teachers"] == ["resnet8-s0", "resnet8-s1"]
    assert second["teachers"] == [first["id"]]
    assert second["teachers_sha256"] == [first["sha256"]]
    assert first["num_parameters"] > second["num_parameters"]
    assert all(0 <= link["test_accuracy"] <= 1 for link in result["chain"])
    assert [link["network"] for link in result["chain"]] == result["assistants"] == ["resnet8", "resnet8"]


def test_the_student_hears_the_last_assistant_alone(two_runs):
    result = two_runs[0].result
    last = result["chain"][-1]
    (teacher,) = result["teachers"]
    assert result["num_teachers"] == 1
    assert (teacher["sha256"], teacher["source"]) == (last["sha256"], "assistant")
    assert teacher["test_accuracy"] == last["test_accuracy"]
    (origin,) = two_runs[0].json("provenance.json")["teachers"]
    assert [link["sha256"] for link in origin["chain"]] == [link["sha256"] for link in result["chain"]]


def test_a_chain_is_trained_once_and_leaves_the_student_as_it_is(two_runs):
    first, second = (outcome.result for outcome in two_runs)
    assert [link["found"] for link in first["chain"]] == [False, False]
    assert [link["found"] for link in second["chain"]] == [True, True]
    for name in ("sha256", "store_key", "test_accuracy", "train_seconds"):
        assert [link[name] for link in first["chain"]] == [link[name] for link in second["chain"]]
    students = [load_student(outcome.directory / "student.safetensors").state_dict() for outcome in two_runs]
    for name, value in students[0].items():
        assert torch.equal(value, students[1][name]), name


def test_the_cost_of_the_chain_is_kept_apart_from_the_students(two_runs):
    first, second = (outcome.result for outcome in two_runs)
    assert first["steps"] == second["steps"] == 4
    assert (first["chain_steps"], second["chain_steps"]) == (8, 0)
    assert first["chain_seconds"] == pytest.approx(first["chain_stored_seconds"])
    assert first["chain_seconds"] > 0
    assert (second["chain_seconds"], second["chain_stored_seconds"]) == (0, first["chain_stored_seconds"])


def test_a_resumed_run_keeps_the_cost_of_its_chain(train, resume, tmp_path):
    words = (*WORDS, "+method.chain.temperature=3", "recipe.epochs=2", "trainer.limit_train_batches=1")
    first = train(tmp_path / "run", *words, "trainer.max_epochs=1").result
    result = resume(tmp_path / "run", "trainer.max_epochs=2").result
    assert first["chain_steps"] > 0
    assert result["epochs_done"] == 2
    for name in ("chain_seconds", "chain_steps", "chain_stored_seconds"):
        assert result[name] == first[name]


# -- what a link learns ------------------------------------------------------------------------------------


def by_hand(settings, spec, teachers):
    """0.1 CE + 0.9 T² KL (T 4) against the mean of the teachers' logits, one epoch of SGD, in a plain loop."""
    chain = chain_of(settings)
    training, recipe = chain.training, chain.training.settings.recipe
    data = ImageDataModule(training.dataset, training.subset, training.views, batch_size=recipe.batch_size)
    torch.manual_seed(settings.seed)
    network = build_network(spec)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = data.train_dataloader()
    loader.set_epoch(0)
    for rows in loader:
        images = data.training_images(rows.index, rows.view, torch.device("cpu"))
        with torch.no_grad():
            target = torch.stack([teacher(images) for teacher in teachers]).mean(0)
        logits = network(images)
        p, log_q = (target / 4).softmax(-1), (logits / 4).log_softmax(-1)
        kl = (p * ((target / 4).log_softmax(-1) - log_q)).sum(-1).mean()
        loss = 0.1 * F.cross_entropy(logits, rows.labels) + 0.9 * 16 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def distance(a, b):
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_link_equals_a_plain_loop_with_the_link_before_as_teacher(tiny_settings):
    settings = tiny_settings(
        *WORDS,
        "+method.chain.recipe={schedule: constant, lr: 0.05, nesterov: false, weight_decay: 5.0e-4}",
        "teachers.table=off",
        "teachers.precision=float32",
        "teachers.fold=false",
        "teachers.compile=never",
        "channels_last=false",
    )
    chain, links = chain_of(settings), links_of(settings)
    store = TeacherStore(Path(settings.teachers.store))
    first, second = (load_network(store.weights(link["store_key"])) for link in links)
    pool = list(gather_teachers(list(chain.origins)).members)
    assert distance(by_hand(settings, chain.assistants[0].spec, pool), first) < 1e-4
    assert distance(by_hand(settings, chain.assistants[1].spec, [first]), second) < 1e-4
    assert distance(by_hand(settings, chain.assistants[1].spec, pool), second) > 1e-3


def test_a_link_is_what_the_run_makes_of_a_plain_student(train, two_runs, tmp_path, store):
    """An assistant taught by the pool, and `kd_mean` with that network as student, are the same training."""
    alone = train(tmp_path / "run", "method=kd_mean", "student.options={width: 0.75}")
    assert alone.code == 0, alone.err
    student = load_student(alone.directory / "student.safetensors")
    key = two_runs[0].result["chain"][0]["store_key"]
    assistant = load_network(TeacherStore(store).weights(key))
    for name, value in assistant.stages.state_dict().items():
        torch.testing.assert_close(student.branches[0].stages.state_dict()[name], value)
    torch.testing.assert_close(student.branches[0].head.weight, assistant.head.weight)


# -- what determines a link --------------------------------------------------------------------------------


def key_of(settings, teachers=("a" * 64,)):
    chain = chain_of(settings)
    assistant = chain.assistants[0]
    return TeacherStore.digest(chain.training.key(assistant.spec, assistant.seed, teachers))


@pytest.mark.parametrize(
    "word",
    [
        "method.temperature=2",
        "method.chain.temperature=2",
        "method.chain.kd_weight=0.5",
        "method.chain.ce_weight=0.5",
        "method.terms.kd_ensemble.weight=0.5",
        "+method.terms.kd_ensemble.combine=probabilities",
        "+method.chain.recipe={epochs: 2}",
        "recipe.lr=0.05",
        "recipe.mixup=0.2",
        "seed=1",
        "data.fraction=0.2",
        "data.subset_seed=1",
        "data.padding=3",
        "trainer.precision=bf16-mixed",
        "trainer.gradient_clip_val=1.0",
        f"method.assistants=[{SMALL}]",
    ],
)
def test_what_determines_an_assistant_changes_its_key(tiny_settings, word):
    assert key_of(tiny_settings(*WORDS, word)) != key_of(tiny_settings(*WORDS))


def test_its_teachers_change_its_key(tiny_settings):
    assert key_of(tiny_settings(*WORDS), ["b" * 64]) != key_of(tiny_settings(*WORDS))


@pytest.mark.parametrize(
    "word",
    [
        "teachers.table=off",
        "student.options.width=0.25",
        "method.chain.temperature=4",
        "tags=[a]",
        f"method.assistants=[{LARGE}]",
    ],
)
def test_what_does_not_determine_an_assistant_leaves_its_key(tiny_settings, word):
    assert key_of(tiny_settings(*WORDS, word)) == key_of(tiny_settings(*WORDS))


def test_another_temperature_trains_anew(tiny_settings, two_runs):
    links = links_of(tiny_settings(*WORDS, "method.chain.temperature=2"))
    assert [link["found"] for link in links] == [False, False]
    known = [link["sha256"] for link in two_runs[0].result["chain"]]
    assert not {link["sha256"] for link in links} & set(known)


def test_a_seed_of_its_own_is_shared_by_all_seeds_of_a_study(tiny_settings):
    fixed = "method.assistants=[{network: resnet8, seed: 5}]"
    assert key_of(tiny_settings(*WORDS, fixed, "seed=1")) == key_of(tiny_settings(*WORDS, fixed, "seed=2"))


# -- interruptions -----------------------------------------------------------------------------------------


def killed_at(epoch, width, monkeypatch):
    """Makes the training of the assistant of that width die at the start of an epoch (from 0)."""
    original = Distiller.on_train_epoch_start

    def start(self):
        if self.current_epoch == epoch and self.student.spec.options["width"] == width:
            raise RuntimeError("killed")
        original(self)

    monkeypatch.setattr(Distiller, "on_train_epoch_start", start)


def test_a_killed_chain_goes_on_at_the_link_and_epoch_where_it_was(tiny_settings, tmp_path, monkeypatch, caplog):
    def settings(name):
        return tiny_settings(*WORDS, "+method.chain.recipe={epochs: 2}", f"teachers.store={tmp_path / name}")

    whole = links_of(settings("whole"))
    with monkeypatch.context() as patch:
        killed_at(1, 0.5, patch)
        with pytest.raises(RuntimeError, match="killed"):
            links_of(settings("killed"))
    folder = tmp_path / "killed" / "teachers"
    (left,) = folder.glob("*.resume")
    assert (left / "last.ckpt").is_file()
    with caplog.at_level(logging.INFO):
        links = links_of(settings("killed"))
    assert "last.ckpt at step 4" in caplog.text
    assert [link["found"] for link in links] == [True, False]
    assert [link["sha256"] for link in links] == [link["sha256"] for link in whole]  # bit for bit
    assert [link["steps"] for link in links] == [8, 8]
    assert not left.exists()


def test_a_damaged_checkpoint_starts_the_link_again(tiny_settings, tmp_path, monkeypatch):
    settings = tiny_settings(*WORDS, "+method.chain.recipe={epochs: 2}", f"teachers.store={tmp_path}")
    with monkeypatch.context() as patch:
        killed_at(1, 0.75, patch)
        with pytest.raises(RuntimeError, match="killed"):
            links_of(settings)
    (left,) = (tmp_path / "teachers").glob("*.resume/last.ckpt")
    left.write_bytes(left.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="damaged"):
        assert links_of(settings)[0]["steps"] == 8


def test_the_store_keeps_the_scratch_of_a_training_only_until_it_is_done(tmp_path, tiny_settings):
    store, key = TeacherStore(tmp_path), {"data": "digits"}
    spec = chain_of(tiny_settings(*WORDS)).assistants[0].spec

    def fail(scratch):
        scratch.mkdir()
        (scratch / "last.ckpt").write_text("half")
        raise RuntimeError("killed")

    def go_on(scratch):
        assert (scratch / "last.ckpt").read_text() == "half"
        (scratch / COST).write_text(json.dumps({"steps": 3}))
        return build_network(spec)

    with pytest.raises(RuntimeError, match="killed"):
        store.get_or_train(key, fail)
    assert not store.path(key).is_file()
    assert store.cost(key) == {}
    store.get_or_train(key, go_on)
    assert store.cost(key) == {"steps": 3}
    left = {path.name for path in (tmp_path / "teachers").iterdir()}
    assert left <= {store.digest(key), f"{store.digest(key)}.lock"}


# -- several at once ---------------------------------------------------------------------------------------


def test_runs_that_ask_at_once_train_each_link_once(tiny_settings, tmp_path, monkeypatch):
    trained, found, start = [], [], threading.Barrier(3)
    settings = tiny_settings(*WORDS)
    gather_teachers(list(chain_of(settings).origins))
    chain = chain_of(settings)
    settings = replace(settings, teachers=replace(settings.teachers, store=str(tmp_path)))
    plan = replace(chain, training=replace(chain.training, settings=settings)).last()

    def stub(training, spec, seed, teachers, scratch):
        trained.append(spec)
        return build_network(spec)

    monkeypatch.setattr(room, "train_assistant", stub)

    def ask():
        start.wait()
        found.append(state_sha256(plan.obtain()[0]))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 2
    assert len(found) == 3
    assert len(set(found)) == 1


@pytest.mark.ddp
def test_two_processes_share_one_chain(tmp_path, store):
    own = [*WORDS, "trainer=ddp_sim", f"teachers.store={store}", f"hydra.run.dir={tmp_path / 'run'}", "seed=3"]
    words = [word for word in TINY if not word.startswith("trainer=")]
    done = subprocess.run(
        [sys.executable, "-m", "ekd_lightning.cli.train", *words, *own],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["num_devices"], result["chain_steps"]) == (2, 8)


# -- other methods, and whom the first link hears ----------------------------------------------------------


def test_the_best_teacher_of_the_pool_teaches_the_first_link(tiny_settings):
    settings = tiny_settings("method=takd", TWO, "data.val_fraction=0.3")
    prepared = prepare(settings, "cpu")
    assert len(prepared.candidates) == 2
    chosen = choose_teacher(settings, prepared)
    (origin,) = chosen.chain.origins
    accuracies = {row["id"]: row["val_accuracy"] for row in chosen.candidate_scores}
    assert accuracies[origin.id] == max(accuracies.values())
    assert [plan.source for plan in chosen.teachers] == ["assistant"]
    assert chosen.method is prepared.method


def test_the_first_teacher_of_the_pool_alone(tiny_settings):
    chain = chain_of(tiny_settings("method=takd", TWO, "method.teacher=first"))
    assert [plan.id for plan in chain.origins] == ["resnet8-s0"]


def test_any_method_with_teachers_can_have_assistants(tiny_settings):
    settings = tiny_settings("method=ekd_pooled", f"method.assistants=[{LARGE}]", "student.branches=2")
    prepared = prepare(settings, "cpu")
    assert prepared.method.assignment.num_teachers == 1
    # The regressors fit the assistant (48 features), not the teachers (32 and 64).
    shapes = {tuple(p.shape) for name, p in prepared.method.named_parameters() if p.ndim == 2}
    assert shapes == {(48, 32)}
    assert [row["network"] for row in links_of(settings)] == ["resnet8"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (0.1, 0.9)),
        (("method.terms.kd_ensemble.weight=0.5", "method.terms.ce_ensemble.weight=0.5"), (0.5, 0.5)),
        (("method.terms.ce_ensemble.weight=1", "method.terms.kd_ensemble.weight=0"), (0.1, 0.9)),
        (("~method.terms.ce_ensemble",), (0.0, 0.9)),
        (("method.chain.ce_weight=0.95", "method.chain.kd_weight=0.05"), (0.95, 0.05)),
    ],
)
def test_links_take_the_weights_of_the_method(tiny_settings, words, expected):
    terms = link_terms(tiny_settings("method=ekd_pooled", *words))
    assert (terms["ce_ensemble"]["weight"], terms["kd_ensemble"]["weight"]) == expected


def test_the_temperature_of_the_chain_wins_over_a_terms_own(tiny_settings):
    words = ("method=takd", "+method.terms.kd_ensemble.temperature=3")
    assert link_terms(tiny_settings(*words))["kd_ensemble"]["temperature"] == 3
    terms = link_terms(tiny_settings(*words, "method.chain.temperature=2"))
    assert "temperature" not in terms["kd_ensemble"]


# -- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("method.assistants=[resnet15]",), r"method\.assistants\[0\]: unknown network 'resnet15'; did you mean"),
        (("method.assistants=[{network: resnet8, options: {wdth: 1}}]",), r"method\.assistants\[0\].*width"),
        (("method.assistants=[{netwrok: resnet8}]",), r"method\.assistants\[0\].*network"),
        (("method.assistants=[{network: resnet8, sed: 1}]",), "did you mean 'seed'"),
        (("method.assistants=[{network: resnet8, seed: -1}]",), r"method\.assistants\[0\]\.seed=-1"),
        (("method.assistants=[{network: resnet8, options: 3}]",), r"options=3: must be a mapping"),
        (("+method.chain.recipe={epoch: 3}",), "did you mean 'epochs'"),
        (("+method.chain.recipe={epochs: 0}",), r"method\.chain\.recipe\.epochs=0"),
        (("+method.chain.recipe={epochs: long}",), r"method\.chain\.recipe\.epochs=long: must be int"),
        (("+method.chain.recipe={batch_size: 500}",), r"^method\.chain\.recipe\.batch_size=500 is larger"),
        (("method.chain.temperature=0",), r"method\.chain\.temperature"),
        (("method.chain.kd_weight=0",), r"method\.chain\.kd_weight"),
        (("method.chain.ce_weight=-1",), r"method\.chain\.ce_weight"),
        (("method=ce", "method.assistants=[resnet8]"), r"method\.assistants=.*'ce' needs no teachers"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained(tiny_settings, tmp_path, words, match):
    base = () if words[0].startswith("method=") else ("method=takd",)
    with pytest.raises(UserError, match=match) as caught:
        chain_of(tiny_settings(*base, *words, f"teachers.store={tmp_path}"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("method.assistants=[resnet14]",), r"more than resnet8-s1 before it"),
        ((f"method.assistants=[{SMALL},{LARGE}]",), r"assistants\[1\]=resnet8 has .* more than resnet8 before it"),
        (("student.options={width: 1}", f"method.assistants=[{SMALL}]"), "fewer than the student resnet8"),
    ],
)
def test_a_chain_out_of_order_is_noticed(tiny_settings, words, match):
    with pytest.warns(UserWarning, match=match):
        chain_of(tiny_settings("method=takd", ALL, *words))


@pytest.mark.parametrize("assistants", ["null", "[]"])
def test_without_assistants_the_method_is_distillation_from_the_pool(tiny_settings, assistants):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare(tiny_settings("method=takd", ALL, f"method.assistants={assistants}"), "cpu")
    assert prepared.chain is None
    assert len(prepared.teachers) == 2
