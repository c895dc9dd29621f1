from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ekd_lightning.data import choose_subset, load_dataset, make_views
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_json
from ekd_lightning.networks import NetworkSpec, build_network, normalization, state_sha256
from ekd_lightning.settings import RecipeSettings, TeacherSettings
from ekd_lightning.teachers.store import TeacherStore
from ekd_lightning.training.distiller import Distiller
from ekd_lightning.training.pool import gather_teachers, plan_teachers
from ekd_lightning.training.teacher_training import TeacherData

SPEC = NetworkSpec("resnet8", 10, normalization("centered"), {"width": 0.5})
KEY = {"network": SPEC.to_dict(), "data": "digits", "seed": 0}


class Trainer:
    """Counts how often it is asked for a network, and notes its scratch folders."""

    def __init__(self, error: BaseException | None = None, gate: threading.Barrier | None = None) -> None:
        self.scratches: list[Path] = []
        self.error, self.gate = error, gate

    def __call__(self, scratch: Path):
        self.scratches.append(scratch)
        scratch.mkdir(exist_ok=True)
        (scratch / "half.ckpt").write_text("half")
        if self.error:
            raise self.error
        return build_network(SPEC)


def test_an_entry_is_trained_once(tmp_path):
    store, train = TeacherStore(tmp_path), Trainer()
    first = store.get_or_train(KEY, train)
    second = TeacherStore(tmp_path).get_or_train(dict(reversed(KEY.items())), train)
    assert len(train.scratches) == 1
    assert state_sha256(first) == state_sha256(second)
    assert not second.training
    assert read_json(store.path(KEY).parent / "key.json") == KEY


def test_nothing_but_the_entry_and_its_lock_stays(tmp_path):
    store = TeacherStore(tmp_path)
    store.get_or_train(KEY, Trainer())
    digest = store.digest(KEY)
    found = {path.relative_to(tmp_path / "teachers").as_posix() for path in tmp_path.rglob("*")}
    assert found - {f"{digest}.lock", "."} == {digest, f"{digest}/teacher.safetensors", f"{digest}/key.json"}


def test_runs_that_ask_at_once_wait_for_one_training(tmp_path):
    train, found, start = Trainer(), [], threading.Barrier(4)

    def ask() -> None:
        start.wait()
        found.append(state_sha256(TeacherStore(tmp_path).get_or_train(KEY, train)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(train.scratches) == 1
    assert len(found) == 4
    assert len(set(found)) == 1


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_training_that_fails_leaves_what_the_next_one_goes_on_from(tmp_path, error):
    store, train = TeacherStore(tmp_path), Trainer(error)
    with pytest.raises(type(error)):
        store.get_or_train(KEY, train)
    assert not store.path(KEY).parent.exists()
    assert {path.suffix for path in (tmp_path / "teachers").iterdir()} <= {".resume", ".lock"}
    assert (train.scratches[0] / "half.ckpt").is_file()
    store.get_or_train(KEY, good := Trainer())
    assert good.scratches == train.scratches
    assert not good.scratches[0].exists()


def test_what_a_killed_training_left_is_not_trusted_and_goes(tmp_path):
    store = TeacherStore(tmp_path)
    final = store.path(KEY).parent
    left = final.with_name(f"{final.name}.part-killed")
    (left / "ready").mkdir(parents=True)
    (left / "ready" / "teacher.safetensors").write_text("half a file")
    other = final.with_name(f"{'0' * 64}.part-alive")  # of another entry, that somebody may be building
    other.mkdir()
    store.get_or_train(KEY, train := Trainer())
    assert len(train.scratches) == 1
    assert not left.exists()
    assert other.exists()


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"teachers\.store="):
        TeacherStore(tmp_path / "file").get_or_train(KEY, Trainer())


def test_a_teacher_is_asked_about_a_test_set_once(tmp_path, monkeypatch):
    """Its scores and its outputs come from the same pass."""
    from ekd_lightning.evaluation.scores import score_logits
    from ekd_lightning.teachers import store as teacher_store

    asked = []

    def predict(network, images, **options):
        asked.append(images)
        return teacher_predict(network, images, **options)

    teacher_predict = teacher_store.predict
    monkeypatch.setattr(teacher_store, "predict", predict)
    data, network = load_dataset("digits", tmp_path), build_network(SPEC).eval()
    for sha, images in (("a", data.test), ("a", data.test), ("b", data.test), ("a", data.train)):
        found = TeacherStore(tmp_path).test_scores(network, sha, images, 100, device="cpu")
    assert len(asked) == 3
    with torch.no_grad():
        logits = network(data.train.images.float() / 255)
    assert found == pytest.approx(score_logits(logits, data.train.labels))

    with monkeypatch.context() as shared:  # read-only, so without a lock
        shared.setattr(TeacherStore, "_lock", pytest.fail)
        kept = TeacherStore(tmp_path).test_outputs(pytest.fail, "a", data.test, 7, "cpu")
    assert [len(part) for part in kept] == [360, 360]
    with torch.no_grad():
        alone = network.outputs(data.test.images[:3].float() / 255)
    assert torch.allclose(kept.logits[:3], alone.logits, atol=1e-5)
    assert torch.allclose(kept.pooled[:3], alone.pooled, atol=1e-5)
    assert not list((tmp_path / "outputs").glob(".*"))


# -- what determines a teacher trained on demand --------------------------------------------------------

RECIPE = RecipeSettings(epochs=1, batch_size=32)
SETTINGS = TeacherSettings(
    pool=[{"train": "resnet8", "options": {"width": 0.5}, "seed": 0}], recipe=RECIPE, train_on="subset"
)


def teacher_data(train_on: str = "subset", fraction: float = 0.1, padding: int = 2, **subset) -> TeacherData:
    dataset = load_dataset("digits", "unused")
    chosen = choose_subset(dataset.train.labels, fraction=fraction, **subset)
    return TeacherData(dataset, chosen, make_views("crop_flip", padding, False), train_on)


def path_of(store: Path, settings: TeacherSettings = SETTINGS, data: TeacherData | None = None) -> Path:
    """Where the store keeps the teacher, read off the call that would train it."""
    asked = []

    class AskedError(Exception):
        pass

    def note(self, key, train):
        asked.append(self.path(key))
        raise AskedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherStore, "get_or_train", note)
        (plan,) = plan_teachers(replace(settings, store=str(store)), data or teacher_data(), "cpu")
        with pytest.raises(AskedError):
            plan.obtain()
    return asked[0]


def entry(**changes):
    return replace(SETTINGS, pool=[{**SETTINGS.pool[0], **changes}])


@pytest.mark.parametrize(
    "settings",
    [
        entry(seed=1),
        entry(train="resnet14"),
        entry(options={"width": 1}),
        entry(normalization="unit"),
        *(
            replace(SETTINGS, recipe=replace(RECIPE, **change))
            for change in (
                {"epochs": 2},
                {"batch_size": 16},
                {"lr": 0.2},
                {"weight_decay": 0.0},
                {"schedule": "step"},
                {"mixup": 0.2},
                {"cutmix": 1.0},
            )
        ),
    ],
)
def test_each_setting_of_a_teacher_changes_its_key(tmp_path, settings):
    assert path_of(tmp_path, settings) != path_of(tmp_path)


@pytest.mark.parametrize(
    "data", [{"fraction": 0.2}, {"seed": 1}, {"val_fraction": 0.2}, {"padding": 4}, {"train_on": "all"}]
)
def test_each_setting_of_its_data_changes_its_key(tmp_path, data):
    assert path_of(tmp_path, data=teacher_data(**data)) != path_of(tmp_path)


def test_what_does_not_determine_a_teacher_does_not_change_its_key(tmp_path):
    assert path_of(tmp_path, replace(SETTINGS, table="off", count=1)) == path_of(tmp_path)


def test_teachers_on_all_images_are_shared_by_all_subsets(tmp_path):
    small, large = (path_of(tmp_path, data=teacher_data("all", fraction)) for fraction in (0.1, 0.5))
    assert small == large
    data = teacher_data("all")
    assert len(data.index()) == len(data.dataset.train)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    settings = replace(SETTINGS, store=str(store))
    return settings, gather_teachers(plan_teachers(settings, teacher_data(), "cpu"))


def test_a_trained_teacher_is_recorded(trained):
    _, teachers = trained
    (identity,) = teachers.identities
    assert (identity.id, identity.source, identity.network) == ("resnet8-s0", "trained", "resnet8")
    assert identity.detail["trained_on"] == "subset"
    teachers.verify()


def test_training_a_teacher_is_reproducible_and_leaves_the_generator_alone(trained, tmp_path):
    settings, first = trained
    plans = plan_teachers(replace(settings, store=str(tmp_path)), teacher_data(), "cpu")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    second = gather_teachers(plans)
    assert torch.equal(torch.rand(3), expected)  # the student draws the same whether or not teachers were there
    assert [t.sha256 for t in first.identities] == [t.sha256 for t in second.identities]
    assert second.members[0].training is False


def test_a_killed_training_goes_on_at_its_last_whole_epoch(tmp_path, monkeypatch):
    def teacher(store):
        settings = replace(SETTINGS, store=str(tmp_path / store), recipe=replace(RECIPE, epochs=3))
        return gather_teachers(plan_teachers(settings, teacher_data(), "cpu")).identities[0].sha256

    epochs, start = [], Distiller.on_train_epoch_start

    def killed(self):
        epochs.append(self.current_epoch)
        if len(epochs) == 3:
            raise RuntimeError("killed")
        start(self)

    monkeypatch.setattr(Distiller, "on_train_epoch_start", killed)
    with pytest.raises(RuntimeError, match="killed"):
        teacher("killed")
    again = teacher("killed")
    assert epochs == [0, 1, 2, 2]
    assert again == teacher("whole")  # bit for bit


def test_a_teacher_that_is_twice_in_the_pool_is_noticed(trained):
    settings, _ = trained
    twice = replace(settings, pool=[*settings.pool, *settings.pool])
    with pytest.warns(UserWarning, match="more than once"):
        plan_teachers(twice, teacher_data(), "cpu")


def test_weights_that_cannot_be_had_lead_to_other_teachers(tmp_path):
    data = teacher_data()
    data = replace(data, dataset=replace(data.dataset, name="cifar10"))
    settings = replace(SETTINGS, pool=["cifar10_resnet20_akamaster"], weights_dir=str(tmp_path), download=False)
    (plan,) = plan_teachers(settings, data, "cpu")
    with pytest.raises(UserError, match=r"teachers\.weights_dir.*teachers=trained"):
        plan.obtain()
    (tmp_path / "akamaster_cifar10_resnet20-12fca82f.th").write_bytes(b"other")
    with pytest.raises(UserError) as caught:
        plan.obtain()
    assert "teachers=trained" not in str(caught.value)
