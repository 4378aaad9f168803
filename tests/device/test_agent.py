"""The agent does what its owner's policy allows, once, and reports numbers; whoever stops or dies, nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.fleet import Fleet
from tests.support.jobs_plane import JobsPlane, announcement_of
from typer.testing import CliRunner

from privatelora.device import DeviceSession
from privatelora.device.agent import Agent
from privatelora.device.cli import app
from privatelora.device.control import ControlPlane
from privatelora.device.installation import installation_of
from privatelora.device.jobs import evaluate
from privatelora.device.training import STOPPED
from privatelora.platform.database import Database
from privatelora.platform.tables import Device, JobState
from privatelora.protocol.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectionLostError,
    QuotaError,
    StoreError,
)

DATA = "".join(f'{{"text": "The door code of house {i} is {4071 + i}."}}\n' for i in range(4))
BOTH = '[allow.finetune-round]\ndata = "rows.jsonl"\n[allow.evaluate]\ndata = "rows.jsonl"\n'
ROUND = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2}  # 4 steps
PLACEMENT = "first=1,last=1,inline=2+3"
MAIN = "from privatelora.device.cli import main; main()"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    found = Database(f"sqlite:///{tmp_path_factory.mktemp('control')}/control.db")
    found.upgrade()
    yield found
    found.close()


@pytest.fixture
def plane(fleet: Fleet, database: Database) -> Iterator[JobsPlane]:
    running = fleet.service("llama")
    with JobsPlane(database, announcement_of(running.url, running.token), running.token) as started:
        yield started


class Owner:
    """A device's owner: their files, and agents of theirs. `heard` is what the agents said."""

    def __init__(self, fleet: Fleet, plane: JobsPlane, folder: Path, agents: ExitStack) -> None:
        self.fleet, self.plane, self.folder, self.store = fleet, plane, folder, folder / "store"
        self.policy = folder / "policy.toml"
        self.policy.write_text(BOTH)
        (folder / "rows.jsonl").write_text(DATA)
        self.heard: list[str] = []
        self.on_word: dict[str, Callable[[], object]] = {}  # what happens when an agent says such a thing, once
        self.steps: list[int] = []
        self.on_step: dict[int, Callable[[], object]] = {}  # what happens after a step
        self._agents = agents
        self.agent = self.start()

    @property
    def installation(self) -> str:
        return installation_of(self.store)

    def start(self) -> Agent:
        """Another agent of the store, as after a restart."""
        if hasattr(self, "agent"):
            self.agent.close()
        control = ControlPlane(self.plane.url, self.plane.token, timeout_s=10.0)
        self._agents.callback(control.close)
        self.agent = Agent(control, self.policy, self.session, self.store, self._say)
        self._agents.callback(self.agent.close)
        return self.agent

    def session(self) -> DeviceSession:
        me = self.fleet.connect(
            self.fleet.service("llama"), server=self.plane.url, store_dir=self.store, placement=PLACEMENT, rank=8
        )
        checkpoint = me.checkpoint

        def counted() -> None:
            checkpoint()
            self.steps.append(int(me.progress["step"]))
            self.on_step.pop(self.steps[-1], lambda: None)()

        me.checkpoint = counted  # type: ignore[method-assign]  # to count its calls
        return me

    def queue(self, kind: str, **params: Any) -> str:
        """Queue a job for this device, as if its agent had made it known before."""
        self.agent.control.register(self.installation, "", ["evaluate", "finetune-round"])
        return self.plane.queue(self.installation, kind, **params)

    def _say(self, text: str) -> None:
        self.heard.append(text)
        for word in [word for word in self.on_word if word in text]:
            self.on_word.pop(word)()


@pytest.fixture
def owner(fleet: Fleet, plane: JobsPlane, tmp_path: Path) -> Iterator[Owner]:
    with ExitStack() as agents:
        yield Owner(fleet, plane, tmp_path, agents)


def test_a_round_and_an_evaluation_are_done_once_and_report_what_the_owner_would_see(
    owner: Owner, plane: JobsPlane
) -> None:
    before = owner.queue("evaluate", batch_size=3)
    owner.agent.run(once=True)
    trained, after = owner.queue("finetune-round", **ROUND), owner.queue("evaluate")
    owner.agent.run(once=True)
    jobs = [plane.job(job) for job in (before, trained, after)]
    assert [(job.state, job.attempts, job.fence, job.error) for job in jobs] == [(JobState.DONE, 1, 1, None)] * 3
    first, round_, last = (job.result or {} for job in jobs)
    with owner.session() as me:
        mine = me.evaluate(owner.folder / "rows.jsonl")
    assert last["loss"] == pytest.approx(mine.loss, rel=1e-5)
    assert (last["tokens"], last["examples"], last["of_examples"]) == (mine.tokens, mine.examples, mine.examples)
    assert last["loss"] < first["loss"]
    assert (round_["steps"], round_["examples"], STOPPED[round_["stopped"]]) == (4, 4, "finished")
    assert round_["loss"] < round_["first_loss"]
    assert round_["bytes_up"] > round_["tokens"] > 0
    assert plane.device(owner.installation).allows == ["evaluate", "finetune-round"]


def test_without_consent_nothing_is_offered_and_without_data_it_is_refused(owner: Owner, plane: JobsPlane) -> None:
    wanted, trained = owner.queue("evaluate"), owner.queue("finetune-round")
    owner.policy.write_text('[allow.finetune-round]\ndata = "gone.jsonl"\n')
    owner.agent.run(once=True)
    assert plane.job(wanted).state == JobState.QUEUED
    assert plane.device(owner.installation).allows == ["finetune-round"]
    refused = plane.job(trained)
    assert (refused.state, refused.attempts) == (JobState.REFUSED, 0)
    assert "the data that the policy names" in str(refused.error)
    owner.policy.write_text("")
    owner.agent.run(once=True)
    assert plane.device(owner.installation).allows == []
    assert owner.steps == []


def test_a_dry_run_says_what_would_be_answered_and_answers_nothing(owner: Owner, plane: JobsPlane) -> None:
    jobs = [owner.queue("evaluate"), owner.queue("finetune-round")]
    (owner.folder / "rows.jsonl").rename(owner.folder / "held-out.jsonl")
    owner.policy.write_text(BOTH.replace("rows", "held-out", 1))
    owner.agent.close()
    options = ("--server", plane.url, "--token", plane.token, "--policy", str(owner.policy), "--dry-run")
    shown = CliRunner().invoke(app, ["agent", *options], env={"PRIVATELORA_STORE_DIR": str(owner.store)})
    assert shown.exit_code == 0, shown.output
    assert f"evaluate {jobs[0]}: the data that the policy names for evaluate are not there" in shown.stdout
    assert f"finetune-round {jobs[1]}: would run" in shown.stdout
    assert {plane.job(job).state for job in jobs} == {JobState.OFFERED}


def test_a_job_that_the_agent_left_goes_on_from_its_last_step_and_ends_once(owner: Owner, plane: JobsPlane) -> None:
    job = owner.queue("finetune-round", **ROUND)
    owner.on_step[2] = owner.agent.stop
    owner.agent.run()
    left = plane.job(job)
    assert (left.state, left.attempts) == (JobState.QUEUED, 1)
    assert "the agent was stopped" in str(left.error)
    plane.due(job)
    owner.start().run(once=True)
    done = plane.job(job)
    assert (done.state, done.attempts, (done.result or {})["steps"]) == (JobState.DONE, 2, 2)
    assert owner.steps == [1, 2, 3, 4]


def test_where_the_data_changed_meanwhile_the_same_job_is_a_new_round(owner: Owner, plane: JobsPlane) -> None:
    job = owner.queue("finetune-round", **ROUND)
    owner.on_step[1] = owner.agent.stop
    owner.agent.run()
    (owner.folder / "rows.jsonl").write_text(DATA * 2)
    plane.due(job)
    owner.start().run(once=True)
    assert (plane.job(job).result or {})["steps"] == 8


@pytest.mark.parametrize("policy", ["", '[when]\nhours = "half past"', BOTH + "[limits]\nmegabytes_per_day = 1e-5"])
def test_consent_that_is_withdrawn_ends_a_job_after_its_step(owner: Owner, plane: JobsPlane, policy: str) -> None:
    job = owner.queue("finetune-round", **ROUND)
    owner.on_step[1] = lambda: owner.policy.write_text(policy)
    owner.on_word["nothing runs now"] = owner.agent.stop
    owner.on_word["failed"] = owner.on_word["done"] = owner.agent.stop
    owner.agent.run()
    if "megabytes" in policy:  # a limit is for the jobs that begin
        assert (plane.job(job).state, owner.steps) == (JobState.DONE, [1, 2, 3, 4])
    else:
        assert (plane.job(job).state, owner.steps) == (JobState.QUEUED, [1])
        assert plane.job(job).error == "the policy allows it no more; the finished steps are saved"


def test_a_job_that_is_cancelled_ends_after_its_step_and_reports_nothing(owner: Owner, plane: JobsPlane) -> None:
    plane.lease_s = 0.15
    job = owner.queue("finetune-round", **ROUND | {"epochs": 100})

    def cancel() -> None:
        plane.cancel(job)
        _until(lambda: not is_kept(job))

    owner.on_step[2] = cancel
    owner.agent.run(once=True)
    assert plane.job(job).state == JobState.CANCELLED
    assert owner.steps == [1, 2]
    assert "POST result" not in plane.calls
    assert any("given up" in line for line in owner.heard)


def test_a_late_holder_stops_and_the_job_is_done_by_the_next(owner: Owner, plane: JobsPlane) -> None:
    plane.lease_s = 0.15
    job = owner.queue("finetune-round", **ROUND)

    def lapse() -> None:
        plane.due(job)
        _until(lambda: not is_kept(job))
        plane.lease_s = 30.0

    owner.on_step[2] = lapse
    owner.agent.run(once=True)
    done = plane.job(job)
    assert (done.state, done.attempts, done.fence) == (JobState.DONE, 2, 2)
    assert owner.steps == [1, 2, 3, 4]


def test_a_report_waits_for_a_control_plane_that_is_away(owner: Owner, plane: JobsPlane) -> None:
    job = owner.queue("finetune-round", **ROUND)
    owner.on_step[4] = lambda: setattr(plane, "away", True)
    owner.on_word["the database is away; trying again"] = lambda: setattr(plane, "away", False)
    owner.agent.run(once=True)
    assert plane.job(job).state == JobState.DONE


def test_what_was_done_but_not_told_is_told_by_the_next_agent_without_doing_it_again(
    owner: Owner, plane: JobsPlane
) -> None:
    job = owner.queue("finetune-round", **ROUND)
    owner.on_step[4] = lambda: setattr(plane, "away", True)
    owner.on_word["the database is away"] = owner.agent.stop
    owner.agent.run()
    assert plane.job(job).state == JobState.RUNNING
    plane.away = False
    plane.due(job)  # its holder fell silent
    owner.start().run(once=True)
    done = plane.job(job)
    assert (done.state, (done.result or {})["steps"], done.fence) == (JobState.DONE, 4, 2)
    assert owner.steps == [1, 2, 3, 4]


def test_the_bytes_of_a_day_end_a_round_and_are_remembered(owner: Owner, plane: JobsPlane) -> None:
    owner.policy.write_text(BOTH + "[limits]\nmegabytes_per_day = 0.05")
    job = owner.queue("finetune-round", **ROUND | {"epochs": 100})
    owner.agent.run(once=True)
    result = plane.job(job).result or {}
    assert STOPPED[result["stopped"]] == "byte budget"
    moved, a_step = (
        result["bytes_up"] + result["bytes_down"],
        (result["bytes_up"] + result["bytes_down"]) / result["steps"],
    )
    assert 50_000 <= moved < 50_000 + a_step
    later = plane.queue(owner.installation, "evaluate")
    owner.start().run(once=True)
    assert plane.job(later).state == JobState.QUEUED
    assert owner.heard[-1] == "nothing runs now: the day's 0.05 MB are spent"


def test_an_evaluation_keeps_to_the_bytes_too(owner: Owner, plane: JobsPlane) -> None:
    owner.policy.write_text(BOTH + "[limits]\nmegabytes_per_day = 1e-3")
    job = owner.queue("evaluate", batch_size=1)
    owner.agent.run(once=True)
    result = plane.job(job).result or {}
    assert (result["examples"], result["of_examples"]) == (1, 4)


def test_a_job_that_finds_the_adapter_in_use_comes_again_and_no_attempt_is_counted(
    owner: Owner, plane: JobsPlane
) -> None:
    job = owner.queue("evaluate")
    with owner.session():
        owner.agent.run(once=True)
    found = plane.job(job)
    assert (found.state, found.attempts, found.error) == (JobState.QUEUED, 0, "failed: store")
    assert any("is in use by another process" in line for line in owner.heard)


def test_only_one_agent_has_a_store(owner: Owner) -> None:
    with pytest.raises(StoreError, match="another agent runs"):
        Agent(owner.agent.control, owner.policy, owner.session, owner.store, print)


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ({"loss": torch.ones(3)}, "failed: protocol"),
        ("The door code is 4071", "failed: protocol"),
        (KeyError("The door code is 4071"), "failed: KeyError"),
    ],
    ids=["tensor", "text", "fault"],
)
def test_what_is_no_report_never_leaves_and_the_agent_goes_on(
    owner: Owner, plane: JobsPlane, monkeypatch: pytest.MonkeyPatch, found: Any, error: str
) -> None:
    def run(context: Any) -> Any:
        with context.session():
            if isinstance(found, Exception):
                raise found
            return found

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "run", run)
        job = owner.queue("evaluate")
        owner.agent.run(once=True)
    assert (plane.job(job).state, plane.job(job).error) == (JobState.FAILED, error)
    assert "POST result" not in plane.calls
    job = owner.queue("evaluate")
    owner.agent.run(once=True)
    assert plane.job(job).state == JobState.DONE


def test_a_spent_quota_is_not_met_again_before_it_resets(
    owner: Owner, plane: JobsPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spent(context: Any) -> Any:
        raise QuotaError("the user's quota of 9 bytes_up_per_day is spent.", retry_after_s=3600.0)

    monkeypatch.setattr(evaluate, "run", spent)
    job = owner.queue("evaluate")
    owner.agent.run(once=True)
    plane.due(job)
    owner.agent.run(once=True)
    assert plane.job(job).state == JobState.QUEUED
    assert "bytes_up_per_day is spent" in str(plane.job(job).error)
    assert plane.calls.count("POST accept") == 1


def test_a_device_that_was_forgotten_makes_itself_known_again(
    owner: Owner, plane: JobsPlane, database: Database
) -> None:
    owner.agent.run(once=True)
    with database.write() as session:
        session.query(Device).filter_by(installation=owner.installation).delete()
    with pytest.raises(ConnectionLostError, match="there is no device"):
        owner.agent.run(once=True)
    owner.agent.run(once=True)
    assert plane.device(owner.installation).allows == ["evaluate", "finetune-round"]


def test_what_waiting_will_not_mend_ends_the_agent(owner: Owner, plane: JobsPlane, fleet: Fleet) -> None:
    plane.token = "another"
    with pytest.raises(AuthenticationError, match="the key is not known"):
        owner.agent.run()
    backbone = fleet.service("llama")
    owner.agent.control = ControlPlane(backbone.url, backbone.token, timeout_s=5.0)
    with pytest.raises(ConfigurationError, match="has no control plane to take jobs from"):
        owner.agent.run()
    owner.agent.control.close()


def test_sigterm_ends_an_agent_that_waits_at_once(owner: Owner, plane: JobsPlane) -> None:
    owner.agent.close()
    options = ("--server", plane.url, "--policy", str(owner.policy))
    variables = {"PRIVATELORA_STORE_DIR": str(owner.store), "PRIVATELORA_TOKEN": plane.token}
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, "agent", *options], env=os.environ | variables, stderr=subprocess.PIPE, text=True
    ) as process:
        _until(lambda: "POST offers" in "".join(plane.calls))
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=15)  # a poll takes 20 s
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert "waiting for jobs" in said


def is_kept(job: str) -> bool:
    """Whether an agent in this process still renews the job's lease."""
    return any(thread.name == f"lease of {job}" for thread in threading.enumerate())


def _until(true: Callable[[], bool], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
