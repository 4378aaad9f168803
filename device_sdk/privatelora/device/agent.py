"""`privatelora-device agent`: runs what its owner's policy allows of what operators ask, and reports numbers.

    Agent.run    registers, takes offers, and for each: refuses it, or accepts it, runs its kind and reports

A job's lease is kept by a thread that does nothing else. A job ends after its step when it is cancelled, the agent is
stopped, or the policy no longer allows it; every finished step is saved, and the same job goes on from there when it
comes again. The control plane may be away for as long as it likes: a report is kept until it is told, also by the next
agent of this store.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privatelora.device.context import JobContext, JobError
from privatelora.device.control import ControlPlane, JobGoneError, Offer
from privatelora.device.installation import installation_of
from privatelora.device.notes import Notes
from privatelora.device.policy import Policy, on_power
from privatelora.protocol.errors import (
    AdmissionError,
    ConfigurationError,
    ConnectionLostError,
    PrivateLoraError,
    ProtocolError,
    StoreError,
)
from privatelora.protocol.jobs import JobKind, checked_params, checked_report

if TYPE_CHECKING:
    from privatelora.device.session import DeviceSession

POLL_S = 20.0  # of one look for offers
LOOK_AGAIN_S = 30.0  # after which a policy that said no is asked again, and a job that could not begin is taken again
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # between attempts to reach a control plane that is away
BEATS = 3  # of a lease, in its time
PASSING = (ConnectionLostError, AdmissionError, StoreError)  # failures that may be over another time
PUBLIC = (JobError, AdmissionError, ConnectionLostError)  # whose words name nothing of the device's

Say = Callable[[str], None]


class Agent:
    """One installation's agent.

    Parameters
    ----------
    policy_file : the owner's policy, read again before each job and after each step.
    open_session : opens the session that jobs work with.
    store_dir : where the installation's number and the agent's own notes are.
    say : is told, in a line, what happens.
    name : what the operator sees this device called; else the first digits of its installation's number.
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
        self.idle = True  # no job is under way
        self._installation = installation_of(store_dir)
        self._name = name or f"device {self._installation[:6]}"
        self._notes = Notes(store_dir)
        self._device = ""
        self._registered: tuple[str, ...] | None = None
        self._not_before: datetime | None = None  # there is no use in a job before then
        self._said = ""

    def stop(self) -> None:
        """End soon: a job that runs ends after its step."""
        self.stopping.set()

    def close(self) -> None:
        """Let another agent have the store."""
        self._notes.close()

    def run(self, once: bool = False) -> None:
        """Do jobs until `stop`, or those that are offered now; raises what no waiting will mend."""
        wait_s = FIRST_WAIT_S
        while not self.stopping.is_set():
            try:
                answered = self._look(once)
                wait_s = FIRST_WAIT_S
            except (ConnectionLostError, AdmissionError) as error:
                if once:
                    raise
                self.say(f"{error.message}; trying again")
                self.stopping.wait(max(wait_s, error.retry_after_s or 0))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                continue
            if once and not answered:
                return

    def answers(self) -> list[tuple[Offer, str | None]]:
        """What the policy would say to each job that is offered now, without saying it; None: it would run."""
        policy = Policy.read(self.policy_file)
        self._register(policy)
        waits = self._waits(policy)
        offers = self.control.offers(self._device, 0.0)
        return [(offer, waits or policy.refusal(offer.kind, self._data_of(policy, offer.kind))) for offer in offers]

    def _look(self, once: bool) -> int:
        """One look for offers; returns how many were answered."""
        if (policy := self._allowing(once)) is None:
            if not once:
                self.stopping.wait(LOOK_AGAIN_S)
            return 0
        try:
            self._register(policy)
            offers = self.control.offers(self._device, 0.0 if once else POLL_S)
        except JobGoneError as error:
            self._registered = None  # the control plane has forgotten this device
            raise ConnectionLostError(error.message) from None
        answered = 0
        for offer in offers:
            if self.stopping.is_set() or (policy := self._allowing(once)) is None:
                break  # what is left is offered again
            self.idle = False
            with suppress(JobGoneError):  # it went to nobody, or was cancelled, before it was begun
                self._answer(policy, offer)
            self.idle = True
            answered += 1
        return answered

    def _allowing(self, strict: bool) -> Policy | None:
        """The policy, if it lets something run now; one that cannot be read lets nothing run, or is raised."""
        try:
            policy = Policy.read(self.policy_file)
            reason = self._waits(policy)
        except ConfigurationError as error:
            if strict:
                raise
            policy, reason = Policy(), error.message
        if reason is not None and reason != self._said:
            self.say(f"nothing runs now: {reason}")
        self._said = reason or ""
        return policy if reason is None else None

    def _waits(self, policy: Policy) -> str | None:
        now = datetime.now()
        if self._not_before is not None and now < self._not_before:
            return f"there is no use in it before {self._not_before:%d %b %H:%M}"
        return policy.waits(now, on_power(), self._notes.moved_today)

    def _answer(self, policy: Policy, offer: Offer) -> None:
        data = self._data_of(policy, offer.kind)
        refusal = policy.refusal(offer.kind, data)
        if refusal is not None or data is None:
            self.say(f"{offer.kind} {offer.id} refused: {refusal}")
            self.control.refuse(self._device, offer, refusal or "")
            return
        self.control.accept(self._device, offer)
        gone = threading.Event()
        context = JobContext(
            params=offer.params,
            data=data,
            max_seconds=None if policy.limits.minutes_per_job is None else 60 * policy.limits.minutes_per_job,
            max_bytes=policy.left_bytes(self._notes.moved_today),
            resumable=self._notes.begun == offer.id,
            open_session=self.open_session,
            on_begin=partial(self._begin, offer),
            on_moved=self._notes.add,
            reason_to_end=lambda: self._reason_to_end(offer, gone),
        )
        with self._lease_kept(offer, gone):
            try:
                numbers = self._notes.report(offer.id)
                if numbers is None:
                    numbers = _run(offer, context)
                    self._notes.finish(numbers)
                else:
                    self._begin(offer)
                self._until_told(partial(self.control.report, self._device, offer, numbers))
                self._notes.end()
                self.say(f"{offer.kind} {offer.id} done: " + " ".join(f"{n}={v:.6g}" for n, v in numbers.items()))
            except JobGoneError as error:
                self.say(f"{offer.kind} {offer.id} given up: {error.message}")
            except PrivateLoraError as error:
                if not context.begun and isinstance(error, PASSING):
                    self._wait_for(LOOK_AGAIN_S)
                self._failed(offer, error, error.retry if isinstance(error, JobError) else isinstance(error, PASSING))
            except Exception as error:  # noqa: BLE001 (a fault of one kind of job must not end the others)
                self.say(traceback.format_exc())
                self._failed(offer, JobError(f"failed: {type(error).__name__}", retry=False), retry=False)
        if context.retry_after_s is not None:
            self._wait_for(context.retry_after_s)

    def _begin(self, offer: Offer) -> None:
        """The job has what it needs, and really begins: that is what counts as an attempt."""
        self.control.start(self._device, offer)
        self._notes.begin(offer.id)
        self.say(f"{offer.kind} {offer.id} runs")

    def _failed(self, offer: Offer, error: PrivateLoraError, retry: bool) -> None:
        self.say(f"{offer.kind} {offer.id} failed: {error.message}")
        if error.retry_after_s is not None:
            self._wait_for(error.retry_after_s)
        public = error.message if isinstance(error, PUBLIC) else f"failed: {error.code}"
        with suppress(JobGoneError):
            self._until_told(partial(self.control.fail, self._device, offer, public, retry))

    def _reason_to_end(self, offer: Offer, gone: threading.Event) -> PrivateLoraError | None:
        """Why a job that runs must end after its step, if it must."""
        if gone.is_set():
            return JobGoneError("it was cancelled, or is another holder's")
        if self.stopping.is_set():
            return JobError("the agent was stopped; the finished steps are saved", retry=True)
        try:
            policy = Policy.read(self.policy_file)
            allowed = offer.kind in policy.allow and policy.waits(datetime.now(), on_power(), 0) is None
        except ConfigurationError:  # an owner who edits it: until it can be read, nothing is allowed
            allowed = False
        return None if allowed else JobError("the policy allows it no more; the finished steps are saved", retry=True)

    def _wait_for(self, seconds: float) -> None:
        self._not_before = datetime.now() + timedelta(seconds=seconds)

    def _data_of(self, policy: Policy, kind: str) -> Path | None:
        allowed = policy.allow.get(kind)
        return None if allowed is None else self.policy_file.parent / Path(allowed.data).expanduser()

    def _register(self, policy: Policy) -> None:
        allows = tuple(sorted(policy.allow))
        if self._registered != allows:
            self._device = self.control.register(self._installation, self._name, allows).id
            self._registered = allows

    @contextmanager
    def _lease_kept(self, offer: Offer, gone: threading.Event) -> Iterator[None]:
        """Renew the job's lease until the block ends; `gone` is set once that is refused."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(offer.lease_s / BEATS):
                try:
                    self.control.heartbeat(self._device, offer)
                except JobGoneError:
                    gone.set()
                    return
                except PrivateLoraError as error:
                    self.say(f"the lease of {offer.id} is not renewed: {error.message}")

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


def _run(offer: Offer, context: JobContext) -> dict[str, int | float]:
    """The kind's own work, between a check of what was asked and one of what is reported."""
    module: Any = import_module(f"privatelora.device.jobs.{offer.kind.replace('-', '_')}")
    kind: JobKind = module.KIND
    context.params = checked_params(kind, context.params)
    found = module.run(context)
    if not isinstance(found, dict):
        raise ProtocolError(f"{offer.kind} gave {type(found).__name__} in place of numbers")
    return checked_report(kind, found)
