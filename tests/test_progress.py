"""What is shown of work that lasts: counts, shares, times left; nothing without anybody who looks."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekd_lightning import progress, progress_lines
from ekd_lightning.progress import Session, Task, _Pace, importing, part, phase, session, track
from ekd_lightning.progress_lines import Lines, status_line


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by `clock.pass_(seconds)` alone."""

    class Clock:
        now = 100.0

        def pass_(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


@pytest.mark.parametrize(("done", "inner", "share"), [(0, 0, 0), (1, 0, 1 / 4), (1, 5, 3 / 8), (4, 0, 1), (5, 9, 1)])
def test_a_part_counts_within_what_it_is_a_part_of(done, inner, share):
    whole, one = Task("whole", 4), Task("one", 10)
    whole.advance(done)
    one.advance(inner)
    whole.part = one
    assert whole.share == share


def test_parts_with_weights_count_by_them():
    with session("test"), phase("test", 10, None) as whole:
        with part("slow", 1, None, weight=8) as slow:
            with part("half", 4, weight=0.5) as half:
                half.advance()
                assert (slow.share, whole.share) == (1 / 8, 1 / 10)
            assert (slow.share, whole.share) == (1 / 2, 4 / 10)
        assert whole.share == 8 / 10
        with part("free", 2, weight=0) as free:
            free.advance()
            assert whole.share == 8 / 10
        with part("quick", weight=2):
            pass
        assert whole.share == 1


def test_without_a_total_the_share_is_that_of_the_part_or_unknown():
    whole = Task("whole")
    assert whole.share is None
    whole.part = Task("one", 2)
    whole.part.advance()
    assert whole.share == 0.5


def test_parts_are_found_where_they_are_at_work_and_gone_afterwards():
    with session("test") as shown, phase("test", 2, None) as whole:
        for image in track(range(4), "test images"):
            assert whole.words() == f"test images {image} of 4"
            with part("inner"):
                assert whole.words() == f"test images {image} of 4  inner"
        assert (whole.part, whole.words()) == (None, "")
        progress.advance(note="91 %")
        assert (whole.share, whole.words()) == (0.5, "91 %")
    assert list(shown.phases) == ["test"]


def test_nothing_is_kept_where_nobody_looks():
    with phase("test") as one, part("images") as two:
        assert list(track("abc", "letters")) == ["a", "b", "c"]
        progress.advance()
        progress.expect(test=1)
    assert (one.elapsed, two.elapsed, one.part) == (0, 0, None)


@pytest.mark.parametrize("block", [phase, part])
def test_what_was_looked_up_stays_without_whom_was_asked(block):
    class Trainer:
        finished = 3

    trainer = Trainer()
    held = weakref.ref(trainer)
    with session("training"), phase("training"):
        with block("training", 4) as task:
            task.count = lambda trainer=trainer: trainer.finished
        del trainer
        assert held() is None
        assert (task.done, task.share) == (3, 0.75)


def test_a_phase_adds_up_over_its_blocks_and_an_inner_session_is_the_outer_one(clock):
    with session("data", "test") as outer:
        with phase("data"):
            clock.pass_(2)
        with session("data", "test", "evaluation") as inner, phase("data"):
            clock.pass_(3)
            assert outer.phases["data"].elapsed == 5
        assert inner is outer
    assert list(outer.phases) == ["data", "test", "evaluation"]


def test_time_left_in_all_follows_the_pace_of_the_work_that_is_done(clock):
    shown = Session(["training", "test", "evaluation"], live=True, keep=True)
    shown.expect({"training": 300, "test": 60, "evaluation": 40})
    assert shown.seconds_left is None
    training = shown.phases["training"]
    training.total = 30
    with training.running():
        clock.pass_(15)
        training.advance(15)
        assert shown.seconds_left == pytest.approx(15 / 150 * 250)
        assert training.seconds_left == pytest.approx(15)
    assert shown.seconds_left == pytest.approx(15 / 150 * 100)  # it has ended early: the other half is not left


def test_a_slow_start_stops_counting_once_as_much_work_again_is_done(clock):
    shown = Session(["training"], live=True, keep=True)
    shown.expect({"training": 1000})
    training = shown.phases["training"]
    training.total = 1000
    with training.running():
        training.advance()
        for _ in range(10):  # the networks compile
            clock.pass_(10)
            assert (shown.seconds_left, training.seconds_left) == (None, None)
        for _ in range(9):
            clock.pass_(2)
            training.advance()
            estimates = (shown.seconds_left, training.seconds_left)
        assert estimates == (pytest.approx(2 * 990), pytest.approx(2 * 990))


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0.1, 9)), min_size=4, max_size=60))
def test_the_pace_is_that_of_the_steps_after_the_first_half(steps):
    pace, states, worked, seconds = _Pace(), [(0, 0.0)], 0, 0.0
    for work, duration in steps:
        worked, seconds = worked + work, seconds + duration
        left = pace.seconds_left(worked, seconds, 19 * worked)
        if seconds > 1:
            states.append((worked, seconds))
            then, since = max(state for state in states if 2 * state[0] <= worked)
            assert left == pytest.approx((seconds - since) / (worked - then) * 19 * worked)


def test_a_line_says_phase_part_and_time(clock):
    shown = Session(["test"], live=True, keep=True)
    with shown.phases["test"].running() as task:
        task.part = Task("best weights", 500)
        clock.pass_(6)
        assert status_line(task, shown) == "test: best weights 0 of 500 (6 s so far)"
        task.part.advance(100)
        assert status_line(task, shown) == "test: best weights 100 of 500 (about 24 s left)"
        task.part.note, task.part.scores = "epoch 2/9", "loss 1.0"  # of epoch 1
        assert task.words(scores=True) == "best weights 100 of 500  epoch 2/9  loss 1.0"
        assert status_line(task, shown) == "test: best weights 100 of 500  epoch 2/9 (about 24 s left)"


def test_lines_come_where_nothing_else_is_said_for_a_while(caplog, monkeypatch):
    for name in ("_FIRST_SECONDS", "_QUIET_SECONDS", "_POLL_SECONDS"):
        monkeypatch.setattr(progress_lines, name, 0.001)
    heard, log = progress_lines.threading.Event(), progress_lines.log
    monkeypatch.setattr(log, "info", lambda *words, **_: (log.log(logging.INFO, *words), heard.set()))
    with caplog.at_level(logging.INFO), progress.reported_by(Lines()), session("export"), phase("export", 3):
        assert heard.wait(60)
    assert caplog.messages[0].startswith("export: 0 of 3 (")
    assert not any(isinstance(handler, progress_lines._LastLine) for handler in logging.getLogger().handlers)


def test_what_an_earlier_process_did_says_nothing_about_the_pace(clock):
    shown = Session(["training", "test"], live=True, keep=True)
    shown.expect({"training": 100, "test": 50})
    with shown.phases["training"].running() as training:
        training.total = 100
        training.advance(80)
        training.begun = 0.8
        clock.pass_(10)
        assert (training.seconds_left, shown.seconds_left) == (None, None)
        training.advance(10)
        assert training.seconds_left == pytest.approx(10)
        assert shown.seconds_left == pytest.approx(60)


def test_a_phase_that_contains_the_others_tells_the_time_left_and_none_counts_twice(clock):
    with session("trials", "training") as shown, phase("trials", 4) as trials:
        for trial in range(2):
            progress.renew()
            with phase("training", 10) as training:
                progress.expect(training=10)
                clock.pass_(5)
                training.advance(5)
                assert training.elapsed == 5
                assert shown.seconds_left == (None if trial == 0 else pytest.approx(45))
                clock.pass_(5)
            trials.advance()
            assert shown.seconds_left == 30 - 10 * trial
        assert shown.elapsed == 20


def test_lines_come_ever_more_rarely_while_nothing_changes(clock, monkeypatch):
    said, lines = [], Lines()
    monkeypatch.setattr(progress_lines.log, "info", lambda *_, **__: said.append(clock.now))
    shown = Session(["training"], live=True, keep=True)
    lines._last_line.time = clock.now
    shown.stack.append(shown.phases["training"])
    for second in range(1400):
        if second == 1300:
            shown.stack[0].note = "epoch 2"
        clock.pass_(1)
        lines.report(shown)
    gaps = [int(later - earlier) for earlier, later in zip([100, *said], said, strict=False)]
    assert gaps[:8] == [3, 15, 30, 60, 120, 240, 300, 300]
    assert [int(time) for time in said[8:]] == [1401, 1416, 1446]


def test_warnings_reach_pythons_last_resort_where_logging_is_left_alone(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with progress.reported_by(Lines()), session("data"):
        logging.getLogger("test_progress").warning("mind this")
    assert capsys.readouterr().err == "mind this\n"


def test_a_part_may_end_while_it_is_looked_at():
    class Ending(Task):
        """Has lost its part once it was asked for."""

        _found: Task | None = None

        @property
        def part(self):
            found, self._found = self._found, None
            return found

        @part.setter
        def part(self, value):
            self._found = value

    for look in (lambda task: task.share, Task.words):
        task, inner = Ending("whole"), Task("inner", 2)
        inner.advance()
        task.part = inner
        assert look(task) in (0.5, "inner 1 of 2")


class Cycle:
    """An object that only the garbage collector can free."""

    def __init__(self) -> None:
        self.own = self


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("imported", [True, False])
def test_the_garbage_collector_rests_during_imports(monkeypatch, collects, imported):
    if not imported:
        monkeypatch.delitem(sys.modules, "torch")
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        lost = weakref.ref(Cycle())
        frozen = gc.get_freeze_count()
        with contextlib.suppress(KeyError), importing("packages"):
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == collects
        assert (gc.get_freeze_count() > frozen) == (collects and not imported)
    finally:
        gc.unfreeze()
        (gc.enable if before else gc.disable)()
    gc.collect()
    assert lost() is None
