"""The edge itself: what becomes one line, what keeps its traceback, and whose directory a job writes into."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from pytorch_lightning.utilities.exceptions import SIGTERMException
from whole_runs import call_teach, call_train

from ekd_lightning import cli, errors
from ekd_lightning.config import directory, edge
from ekd_lightning.config.config import compose_settings, register_schema
from ekd_lightning.config.edge import ConsoleLines, logged_as_by_commands, one_line, run_program
from ekd_lightning.errors import UserError
from ekd_lightning.runs.lock import DirectoryLock, LockedError, is_held
from ekd_lightning.studies import multirun


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    others = ("RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NAME", "TORCHELASTIC_RUN_ID")
    for name in ("HYDRA_FULL_ERROR", *directory._LAUNCH_ENV, *others):
        monkeypatch.setenv(name, "")  # so that it is restored whatever happens to it
        monkeypatch.delenv(name)


def fail(error: BaseException):
    def body():
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("x=1: too\n  much"), "ekd-x: error: x=1: too much"),
        (PermissionError(13, "Permission denied", "/a"), "ekd-x: error: /a: Permission denied"),
        (FileExistsError(17, "File exists", "/a"), "ekd-x: error: /a: File exists"),
    ],
)
def test_a_mistake_is_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as stop:
        run_program("ekd-x", fail(error))
    assert stop.value.code == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("call", [call_train, call_teach])
def test_a_declared_study_is_no_setting_of_a_run(call, tmp_path):
    shown = call("--help", directory=tmp_path / "run").out
    assert "\nmethod: " in shown
    assert "\nstudy: " not in shown
    refused = call("study=full", directory=tmp_path / "run")
    assert refused.code == 2
    assert "ekd-compare --study full" in refused.err


def run_config(*words: str):
    """A single run's configuration, with Hydra's own node."""
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        return compose("train", overrides=list(words), return_hydra_config=True)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([f"hydra.run.dir=/tmp/{300 * 'x'}"], "File name too long"),
        (["hydra.run.dir=loop/run"], "symbolic links"),
        (["trainer.num_nodes=two"], "trainer.num_nodes=two"),
    ],
)
def test_a_directory_that_cannot_be_claimed_is_one_line(capsys, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(SystemExit) as stop:
        directory.ClaimDirectory().on_run_start(run_config(*words))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize(("module", "event"), [(directory, "run"), (multirun, "multirun")])
def test_a_bug_in_a_callback_ends_the_program(capsys, monkeypatch, module, event):
    """Hydra would make a warning of it, and let the job run in a directory that it does not have."""
    monkeypatch.setattr(module, "claim_output", lambda *_: fail(RuntimeError("connection lost"))())
    callback = directory.ClaimDirectory() if event == "run" else multirun.SweepSummary()
    with pytest.raises(SystemExit) as stop:
        getattr(callback, f"on_{event}_start")(run_config())
    assert stop.value.code == 1
    assert "Traceback" in (err := capsys.readouterr().err)
    assert "RuntimeError: connection lost" in err


def test_lines_of_a_sweep_name_the_folder_of_their_run(monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    record = logging.LogRecord("x", logging.WARNING, "", 0, "mind this", (), None)
    lines = ConsoleLines(sys.stdout)
    assert lines.format(record) == "warning: mind this"
    for folder, label in (("${hydra.job.num}", "6"), ("7", "7"), ("ekd-f0.1-s0", "ekd-f0.1-s0")):  # new, resumed, study
        words = ("hydra.mode=MULTIRUN", "hydra.job.num=6", f"hydra.sweep.subdir={folder}")
        HydraConfig.instance().set_config(run_config(*words))
        assert lines.format(record) == f"[{label}] warning: mind this"


@pytest.mark.parametrize(("handlers", "said"), [([], "epoch 1\n"), ([logging.NullHandler()], "")])
def test_a_call_from_python_logs_as_a_command_unless_the_program_has_set_up_logging(
    capsys, monkeypatch, handlers, said
):
    monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
    log = logging.getLogger("ekd_lightning.x")
    with logged_as_by_commands():
        log.info("epoch 1")
    log.info("afterwards")
    assert capsys.readouterr().err == said


def interrupted_by_lightning() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def warned_by_slurm() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    terminated()


def terminated_twice() -> None:
    try:
        terminated()
    except KeyboardInterrupt:
        terminated()  # while the first is being handled
        raise KeyboardInterrupt("to continue: ekd-y") from None


def told_before() -> None:
    with one_line("inner"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("body", "line", "code"),
    [
        (fail(KeyboardInterrupt()), "ekd-x: interrupted", 130),
        (fail(KeyboardInterrupt("2 of 3 done")), "ekd-x: interrupted: 2 of 3 done", 130),
        (interrupted_by_lightning, "ekd-x: interrupted", 130),
        (told_before, "inner: interrupted", 130),
        (terminated, "ekd-x: interrupted", 143),
        (terminated_twice, "ekd-x: interrupted: to continue: ekd-y", 143),
        (warned_by_slurm, "ekd-x: interrupted", 143),
        (fail(SIGTERMException()), "ekd-x: interrupted", 143),
    ],
)
def test_an_interruption_is_one_line(capsys, body, line, code):
    before = [signal.getsignal(number) for number in edge._ENDING]
    for _ in range(2):  # a second command of the same process ends in the same way
        with pytest.raises(SystemExit) as stop:
            run_program("ekd-x", body)
        assert stop.value.code == code
        assert capsys.readouterr().err == line + "\n"
    assert [signal.getsignal(number) for number in edge._ENDING] == before


def test_a_fork_that_is_terminated_dies_by_the_signal(monkeypatch):
    handler, own, done = edge._Termination(), os.getpid(), []
    monkeypatch.setattr(os, "getpid", lambda: own + 1)
    monkeypatch.setattr(os, "kill", lambda *call: done.append(call))
    monkeypatch.setattr(signal, "signal", lambda *call: done.append(call))
    handler(signal.SIGTERM, None)
    assert done == [(signal.SIGTERM, signal.SIG_DFL), (own + 1, signal.SIGTERM)]


def test_ctrl_c_while_modules_are_imported_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/ekd-x"])
    cli._in_one_line(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "ekd-x: interrupted\n"
    cli._in_one_line(ValueError, ValueError("ours"), None)
    assert capsys.readouterr().err == "ValueError: ours\n"


def test_what_libraries_say_at_length_is_cut_between_words():
    assert errors.one_line(ValueError("so  much\n" * 40), 20) == "so much so much so …"
    assert errors.one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("error", [ValueError("ours"), KeyError("ours"), SystemExit(3)])
def test_our_own_mistakes_keep_their_traceback(capsys, error):
    with pytest.raises(type(error)) as caught:
        run_program("ekd-x", fail(error))
    assert caught.value is error
    assert capsys.readouterr().err == ""


@pytest.fixture
def sweep_job(tmp_path, monkeypatch):
    """A job of a multirun, as Hydra would tell it."""
    hydra = {
        "overrides": {
            "task": ["seed=1", "recipe.lr=0.1"],
            "hydra": ["hydra.sweep.dir=x", "+hydra.searchpath=[file://own]", "hydra.mode=MULTIRUN"],
        },
        "run": {"dir": "elsewhere"},
        "job": {"config_name": "train"},
        "runtime": {
            "output_dir": str(tmp_path / "1"),
            "config_sources": [
                {"path": "ekd_lightning.conf", "schema": "pkg", "provider": "main"},
                {"path": "/own", "schema": "file", "provider": "command-line"},
            ],
        },
    }
    cfg = OmegaConf.create(hydra)
    OmegaConf.set_struct(cfg, True)
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: cfg))
    monkeypatch.setattr(sys, "argv", ["ekd-train", "-m", "-cn", "teach", "seed=1,2", "recipe.lr=0.1"])
    return cfg


@pytest.mark.parametrize("name", ["SLURM_PROCID", "X"])
def test_other_ranks_repeat_this_job_and_nothing_is_left_behind(sweep_job, tmp_path, monkeypatch, name):
    """Also in a batch script or a shell of SLURM, which starts no ranks itself."""
    monkeypatch.setenv(name, "0")
    before = list(sys.argv)
    with directory.ddp_reruns_this_job(tmp_path / "1"):
        job = ["seed=1", "recipe.lr=0.1", "+hydra.searchpath=[file://own]", "hydra.mode=RUN"]
        assert sys.argv == ["ekd-train", "-cn", "teach", *job]
        assert os.environ[directory.DIRECTORY] == str(tmp_path / "1")
        os.environ.update(LOCAL_RANK="0", NODE_RANK="0", WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1")
    assert sys.argv == before
    assert sweep_job.run.dir == "elsewhere"
    assert not any(name in os.environ for name in directory._LAUNCH_ENV)


def test_a_command_of_another_kind_names_the_program_that_runs_one_job(sweep_job, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["_submit.py", "folder"])
    main = sys.modules["__main__"]
    before = main.__spec__
    with directory.ddp_reruns_this_job(Path("x"), program="ekd_lightning.cli.train"):
        assert main.__spec__.name == "ekd_lightning.cli.train"  # what Lightning starts with `python -m`
        assert sys.argv[1:3] == ["--config-name=train", "--config-dir=/own"]
    assert main.__spec__ is before


def test_also_after_a_failure(sweep_job):
    before = list(sys.argv)

    def fails() -> None:
        with directory.ddp_reruns_this_job(Path("x")):
            os.environ["LOCAL_RANK"] = "0"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert sys.argv == before
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"])
def test_a_rank_that_others_started_is_left_alone(sweep_job, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    before = list(sys.argv)
    with directory.ddp_reruns_this_job(Path("x")):
        assert sys.argv == before
    assert os.environ[name] == "1"


def test_launch_variables_of_the_user_come_back(sweep_job, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node0")
    with directory.ddp_reruns_this_job(Path("x")):
        os.environ.update(MASTER_ADDR="changed", MASTER_PORT="1")
    assert os.environ["MASTER_ADDR"] == "node0"
    assert "MASTER_PORT" not in os.environ


def test_settings_can_be_composed_without_the_command():
    settings = compose_settings("method=kd_mean", "data.fraction=0.5", "seed=4")
    assert (settings.method.name, settings.student.branches, settings.data.fraction) == ("kd_mean", 1, 0.5)
    assert settings.trainer["max_epochs"] == settings.recipe.epochs


@pytest.fixture(params=["torchrun", "slurm"])
def as_ranks(request, tmp_path, monkeypatch):
    """Calls a function in three processes, forked to stand for the ranks, and returns what each said or raised."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store = None
    if request.param == "torchrun":  # its agent keeps the store itself
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("WORLD_SIZE", "3")
    else:
        given = {"JOB_ID": "1", "NTASKS": "3", "NTASKS_PER_NODE": "3", "JOB_NAME": "x", "NODELIST": "n"}
        for name, value in given.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    rank_of = "RANK" if request.param == "torchrun" else "SLURM_PROCID"
    (said := tmp_path / "said").mkdir()

    def call(function) -> list[str]:
        for rank in (2, 1, 0):
            if os.fork() == 0:
                with contextlib.suppress(BaseException):
                    os.environ[rank_of] = str(rank)
                    try:
                        answer = str(function())
                    except Exception as error:
                        answer = f"{type(error).__name__}: {error}"
                    (said / str(rank)).write_text(answer)
                os._exit(0)
        for _ in range(3):
            os.wait()
        return [(said / str(rank)).read_text() for rank in range(3)]

    yield call
    del store


def test_all_processes_of_a_job_are_told_the_directory_of_the_first(as_ranks, tmp_path):
    told = as_ranks(lambda: directory.agree("hydra.run.dir", lambda: tmp_path / "it's"))
    assert told == 3 * [str(tmp_path / "it's")]


@pytest.mark.parametrize("as_ranks", ["slurm"], indirect=True)
def test_the_next_job_of_an_array_may_have_the_next_port(as_ranks, tmp_path, monkeypatch):
    """Lightning derives a job's port from its number."""
    monkeypatch.setattr(directory, "_PATIENCE", timedelta(seconds=30))
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]) + 1)):
        told = as_ranks(lambda: directory.agree("hydra.run.dir", lambda: tmp_path))
    assert told == 3 * [str(tmp_path)]


def test_tasks_that_do_not_come_are_one_line(monkeypatch):
    """In a batch script, the command was started without srun."""
    given = {"JOB_ID": "70001", "NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_NAME": "x", "PROCID": "0", "NODELIST": "n"}
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(dist, "TCPStore", lambda *_, **__: fail(RuntimeError("1/2 clients joined"))())
    with pytest.raises(UserError, match=r"the 2 tasks .* n:25001 within 5 minutes; .* srun \(1/2 clients joined\)"):
        directory.agree("hydra.run.dir", lambda: Path("x"))


@pytest.mark.parametrize("why", ["finished", "in use"])
def test_what_is_refused_to_the_first_process_is_refused_to_all(as_ranks, tmp_path, why):
    (run := tmp_path / "run").mkdir()
    config = run_config(f"hydra.run.dir={run}")
    if why == "finished":
        (run / "result.json").write_text("{}")
    with DirectoryLock(run) if why == "in use" else contextlib.nullcontext():
        first, *others = as_ranks(lambda: directory.claim_output(config, "run"))
    assert ("holds a finished run" if why == "finished" else "in use by process") in first
    assert others == 2 * [
        "UserError: hydra.run.dir: the first process of this job was refused the directory; see its own error"
    ]


def test_a_claimed_directory_is_locked_until_its_run_comes(tmp_path):
    config = run_config(f"hydra.run.dir={tmp_path / 'run'}")
    run = directory.claim_output(config, "run")
    assert is_held(run)
    with pytest.raises(LockedError):
        directory.claim_output(config, "run")
    with DirectoryLock(run):
        assert is_held(run)
        with pytest.raises(LockedError):
            DirectoryLock(run).acquire()
    assert not is_held(run)
    directory.remove_unused()
    assert list(tmp_path.iterdir()) == []
    directory.claim_output(config, "run")
    directory.remove_unused()
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_cannot_agree_are_told_to_name_the_directory(monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(UserError, match=r"hydra\.run\.dir=\.\.\."):
        directory.agree("hydra.run.dir", lambda: Path("x"))
    monkeypatch.delenv("NODE_RANK")
    with pytest.raises(UserError, match=r"hydra\.run\.dir=\.\.\."):
        directory.agree("hydra.run.dir", lambda: Path("x"), nodes=2)
    assert directory.agree("hydra.run.dir", lambda: Path("x")) == Path("x")


def test_retries_of_the_hub_are_one_line(caplog, monkeypatch):
    monkeypatch.setattr(edge, "_HUB_RETRIES", edge._HubRetries())
    client = logging.getLogger("huggingface_hub.utils._http")  # the name that its client logs by
    edge.quiet_libraries()
    try:
        for number in (1, 2):
            client.warning(
                "'[Errno -2] Name or service not known' thrown while requesting HEAD https://huggingface.co/a"
            )
            client.warning("Retrying in %ss [Retry %s/5].", 2**number, number)
        client.warning("You are sending unauthenticated requests")
    finally:
        client.removeFilter(edge._HUB_RETRIES)
    told = "a request to the Hugging Face hub failed ('[Errno -2] Name or service not known'); trying again"
    assert caplog.messages == [told, "You are sending unauthenticated requests"]


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_commands_of_two_threads_leave_no_folder_behind(monkeypatch, tmp_path, first_ends_first):
    """A folder that stayed would be taken for the place where later commands of the process were started."""
    monkeypatch.delenv(edge.STARTED_IN, raising=False)
    monkeypatch.chdir(tmp_path)
    first, second = edge._started_here(), edge._started_here()
    first.__enter__()
    second.__enter__()
    assert os.environ[edge.STARTED_IN] == str(tmp_path)
    for one in (first, second) if first_ends_first else (second, first):
        one.__exit__(None, None, None)
    assert edge.STARTED_IN not in os.environ
