"""`privatelora-device agent`: runs what its owner's policy allows of what operators ask, and reports numbers.

    Agent.run    registers, takes offers, and for each: refuses it, or accepts it, runs its kind and reports

A job's lease is kept by a thread that does nothing else. A job that is cancelled, or an agent that is stopped, ends the
training after its step; every finished step is saved, and the same job goes on from there when it comes again. The
control plane may be away for as long as it likes: what is to be reported is reported once it is back, unless the job
was given to somebody else meanwhile.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from privatelora.device.control import ControlPlane, JobGoneError, Offer
from privatelora.device.policy import Policy, on_power
from privatelora.device.store import installation_of
from privatelora.protocol.errors import AdmissionError, ConnectionLostError, PrivateLoraError, ProtocolError, StoreError
from privatelora.protocol.jobs import JobKind, checked_params, checked_report

if TYPE_CHECKING:
    from privatelora.device.session import DeviceSession

POLL_S = 20.0  # of one look for offers
LOOK_AGAIN_S = 30.0  # after which the policy is asked again that said no
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # between attempts to reach a control plane that is away
BEATS = 3  # of a lease, in its time
PASSING = (ConnectionLostError, AdmissionError, StoreError)  # failures that may be over another time

Say = Callable[[str], None]


class JobError(PrivateLoraError):
    """The job could not be done here; `retry`: it may be another time."""

    code = "job"

    def __init__(self, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


@dataclass
class JobContext:
    """What a kind's `run` is given.

    Parameters
    ----------
    params : as the kind's struct has checked them.
    data : file that the policy names for this kind.
    open_session : opens the `DeviceSession` that the agent was started for.
    max_seconds, max_bytes : of the policy; None: no limit.
    resumable : whether this job was begun here before.
    """

    params: dict[str, Any]
    data: Path
    open_session: Callable[[], DeviceSession]
    max_seconds: float | None
    max_bytes: int | None
    resumable: bool
    stopping: threading.Event
    gone: threading.Event = field(default_factory=threading.Event)
    moved_bytes: int = 0

    @contextmanager
    def session(self) -> Iterator[DeviceSession]:
        """The device's session; what it moves is counted for the policy's limit."""
        with self.open_session() as me:
            try:
                yield me
            finally:
                self.moved_bytes += me.remote.count.payload_up + me.remote.count.payload_down

    def stops(self) -> bool:
        """Whether to stop after the present step."""
        return self.stopping.is_set() or self.gone.is_set()

    def check(self) -> None:
        """Raise what ended the job, if anything did."""
        if self.gone.is_set():
            raise JobGoneError("the job was cancelled, or is another holder's")
        if self.stopping.is_set():
            raise JobError("the agent was stopped; the finished steps are saved", retry=True)

    def give_up(self, why: str, retry_after_s: float | None = None) -> NoReturn:
        """The job cannot be done now."""
        raise JobError(why, retry=retry_after_s is not None or self.stops())

    def resumes(self, me: DeviceSession) -> bool:
        """Whether a fine-tune of this job was cut off here and can go on."""
        return self.resumable and bool(me.progress) and not me.progress["finished"]

    @staticmethod
    def least(*limits: Any) -> Any:
        """The smallest of the limits that there are; None if there is none."""
        return min((limit for limit in limits if limit is not None), default=None)


class Agent:
    """One installation's agent.

    Parameters
    ----------
    policy_file : the owner's policy, read again before each look.
    store_dir : where the installation's number and the agent's own notes are.
    say : is told, in a line, what happens.
    """

    def __init__(
        self,
        control: ControlPlane,
        policy_file: Path,
        open_session: Callable[[], DeviceSession],
        store_dir: Path,
        say: Say,
        name: str = "",
    ) -> None:
        self.control, self.policy_file, self.open_session, self.say = control, policy_file, open_session, say
        self.stopping = threading.Event()
        self._name, self._installation = name or platform.node()[:100], installation_of(store_dir)
        self._notes = Notes(store_dir / ".agent.json")
        self._device = ""
        self._registered: tuple[str, ...] | None = None

    def stop(self) -> None:
        """End soon: a job that runs ends after its step."""
        self.stopping.set()

    def run(self, once: bool = False) -> None:
        """Do jobs until `stop`, or those that are offered now; raises what no waiting will mend."""
        wait_s = FIRST_WAIT_S
        while not self.stopping.is_set():
            try:
                done = self._look(0.0 if once else POLL_S)
                wait_s = FIRST_WAIT_S
            except (ConnectionLostError, AdmissionError) as error:
                if once:
                    raise
                self.say(f"{error.message}; trying again")
                self.stopping.wait(max(wait_s, error.retry_after_s or 0))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                continue
            if once and not done:
                return

    def answers(self) -> list[tuple[Offer, str | None]]:
        """What the policy would say to each job that is offered now, without saying it; None: it would run."""
        policy = self._policy()
        self._register(policy)
        waits = self._waits(policy)
        offers = self.control.offers(self._device, 0.0)
        return [(offer, waits or policy.refusal(offer.kind, self._data_of(policy, offer.kind))) for offer in offers]

    def _look(self, wait_s: float) -> int:
        """One look for offers; returns how many were answered."""
        policy = self._policy()
        self._register(policy)
        waits = self._waits(policy)
        if waits is not None:
            self.say(f"nothing runs now: {waits}")
            if wait_s:
                self.stopping.wait(LOOK_AGAIN_S)
            return 0
        answered = 0
        for offer in self.control.offers(self._device, wait_s):
            if self.stopping.is_set() or (answered and self._waits(self._policy())):
                break  # what is left is offered again
            with suppress(JobGoneError):  # it went to nobody, or was cancelled, before it was begun
                self._answer(policy, offer)
            answered += 1
        return answered

    def _answer(self, policy: Policy, offer: Offer) -> None:
        data = self._data_of(policy, offer.kind)
        refusal = policy.refusal(offer.kind, data)
        if refusal is not None or data is None:
            self.say(f"{offer.kind} {offer.id} refused: {refusal}")
            self.control.refuse(self._device, offer, refusal or "")
            return
        self.control.accept(self._device, offer)
        self.control.start(self._device, offer)
        self.say(f"{offer.kind} {offer.id} runs")
        minutes = policy.limits.minutes_per_job
        context = JobContext(
            offer.params,
            data,
            self.open_session,
            60 * minutes if minutes is not None else None,
            policy.left_bytes(self._notes.moved_today()),
            self._notes.begun == offer.id,
            self.stopping,
        )
        self._notes.begin(offer.id)
        try:
            with self._lease_kept(offer, context):
                numbers = _run(offer, context)
            self._until_told(lambda: self.control.report(self._device, offer, numbers))
            self.say(f"{offer.kind} {offer.id} done: " + " ".join(f"{n}={v:.6g}" for n, v in numbers.items()))
            self._notes.end()
        except JobGoneError as error:
            self.say(f"{offer.kind} {offer.id} given up: {error.message}")
        except PrivateLoraError as error:
            self.say(f"{offer.kind} {offer.id} failed: {error.message}")
            retry = error.retry if isinstance(error, JobError) else isinstance(error, PASSING)
            with suppress(JobGoneError):
                self._until_told(partial(self.control.fail, self._device, offer, _public(error), retry))
        finally:
            self._notes.add(context.moved_bytes)

    def _waits(self, policy: Policy) -> str | None:
        return policy.waits(datetime.now(), on_power(), self._notes.moved_today())

    def _policy(self) -> Policy:
        return Policy.read(self.policy_file)

    def _data_of(self, policy: Policy, kind: str) -> Path | None:
        allowed = policy.allow.get(kind)
        return None if allowed is None else self.policy_file.parent / Path(allowed.data).expanduser()

    def _register(self, policy: Policy) -> None:
        allows = tuple(sorted(policy.allow))
        if self._registered != allows:
            self._device = self.control.register(self._installation, self._name, allows).id
            self._registered = allows

    @contextmanager
    def _lease_kept(self, offer: Offer, context: JobContext) -> Iterator[None]:
        """Renew the job's lease until the block ends; `context.gone` is set once that is refused."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(offer.lease_s / BEATS):
                try:
                    self.control.heartbeat(self._device, offer)
                except JobGoneError:
                    context.gone.set()
                    return
                except PrivateLoraError as error:
                    self.say(f"lease of {offer.id} not renewed: {error.message}")

        thread = threading.Thread(target=renew, name=f"lease of {offer.id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _until_told(self, tell: Callable[[], None]) -> None:
        """Say how a job ended, once the control plane can be reached; an agent that stops tries once."""
        wait_s = FIRST_WAIT_S
        while True:
            try:
                tell()
                return
            except (ConnectionLostError, AdmissionError) as error:
                if self.stopping.is_set():
                    raise
                self.say(f"{error.message}; trying again")
                self.stopping.wait(max(wait_s, error.retry_after_s or 0))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)


class Notes:
    """What an agent remembers across restarts: the job that it has begun, and the bytes that jobs moved today."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error}); delete it") from None

    @property
    def begun(self) -> str | None:
        """Id of the job that was begun last and has not ended here."""
        return self._kept.get("begun")

    def begin(self, job: str) -> None:
        self._write(begun=job)

    def end(self) -> None:
        self._write(begun=None)

    def moved_today(self) -> int:
        return int(self._kept.get("moved", 0)) if self._kept.get("day") == _today() else 0

    def add(self, moved: int) -> None:
        self._write(moved=self.moved_today() + moved, day=_today())

    def _write(self, **changes: Any) -> None:
        self._kept |= changes
        new = self._path.with_suffix(".new")
        try:
            new.touch(mode=0o600)
            new.write_text(json.dumps(self._kept))
            os.replace(new, self._path)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written ({error}); free space there") from None


def _run(offer: Offer, context: JobContext) -> dict[str, int | float]:
    """The kind's own work, between a check of what was asked and one of what is reported."""
    module: Any = import_module(f"privatelora.device.jobs.{offer.kind.replace('-', '_')}")
    kind: JobKind = module.KIND
    context.params = checked_params(kind, context.params)
    found = module.run(context)
    if not isinstance(found, dict):
        raise ProtocolError(f"{offer.kind} gave {type(found).__name__} in place of numbers")
    return checked_report(kind, found)


def _public(error: PrivateLoraError) -> str:
    """What an operator is told of a failure: its kind, and our own words where they name nothing of the device's."""
    return (
        error.message if isinstance(error, JobError | AdmissionError | ConnectionLostError) else f"failed: {error.code}"
    )


def _today() -> str:
    return time.strftime("%Y-%m-%d")
