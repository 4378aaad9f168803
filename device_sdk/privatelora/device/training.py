"""The training round: a plain function over Flower records, which `DeviceSession.finetune` and a ClientApp call.

    local_round(config, state, session=..., data=...) -> MetricRecord

`config` is a Flower ConfigRecord (epochs, learning rate, ...), `state` a RecordDict that holds the adapter and AdamW's
moments before and after (`state.py`). After every step the state is in the local store, so that a killed device goes on
from its last step. Only the MetricRecord, numbers, is for anyone else.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from flwr.common import ConfigRecord, MetricRecord, RecordDict

from privatelora.device.data import Dataset, LocalData, batches
from privatelora.protocol.errors import ConfigurationError, QuotaError

if TYPE_CHECKING:
    from privatelora.device.session import DeviceSession
    from privatelora.device.split import LossFn

STOPPED = ("finished", "early stopping", "time budget", "byte budget", "callback", "quota")
KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}
RATE_OF_HIGH_RANK, RATE_OF_LOW_RANK, LOW_RANK = 5e-3, 7e-3, 32  # DESIGN section 3's recipe


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    loss is the batch's mean in nats a labelled token; bytes are tensor bytes since this fine-tune began.
    """

    step: int  # from 1
    total_steps: int
    epoch: int  # from 0
    loss: float
    tokens: int
    tokens_per_s: float
    bytes_up: int
    bytes_down: int
    learning_rate: float
    seconds: float
    eta_s: float


Callback = Callable[[StepRecord], bool | None]


@dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tune did; `validation` is the held-out loss after each epoch, in nats a labelled token."""

    history: tuple[StepRecord, ...]
    validation: tuple[float, ...]
    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    bytes_up: int
    bytes_down: int
    stopped: str
    retry_after_s: float | None = None  # where a quota stopped it: seconds until that resets


@dataclass(frozen=True)
class Plan:
    """A round's settings, read from its ConfigRecord; 0 means no limit."""

    epochs: int = 3
    learning_rate: float = 0.0
    batch_size: int = 4
    warmup_steps: int = 10
    clip_norm: float = 1.0
    seed: int = 0
    patience: int = 0
    max_seconds: float = 0.0
    max_bytes: int = 0
    resume: bool = False
    wait_for_quota: bool = False

    @classmethod
    def read(cls, config: ConfigRecord) -> Plan:
        unknown = set(config) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigurationError(
                f"a round has no setting {', '.join(sorted(unknown))}; known: {', '.join(cls.__dataclass_fields__)}"
            )
        for name, value in config.items():
            kind = str(cls.__dataclass_fields__[name].type)
            if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
                raise ConfigurationError(f"{name} is {value!r}; it must be of type {kind}")
        plan = cls(**cast(dict[str, Any], dict(config)))
        if plan.epochs < 1 or plan.batch_size < 1:
            raise ConfigurationError(f"epochs {plan.epochs} and batch_size {plan.batch_size} must be 1 or more")
        if not (math.isfinite(plan.learning_rate) and plan.learning_rate >= 0 and plan.clip_norm > 0):
            raise ConfigurationError(
                f"learning_rate {plan.learning_rate} must be a finite number above 0, and clip_norm "
                f"{plan.clip_norm} above 0"
            )
        if not all(limit >= 0 for limit in (plan.warmup_steps, plan.patience, plan.max_seconds, plan.max_bytes)):
            raise ConfigurationError("warmup_steps, patience, max_seconds and max_bytes must be 0 or more")
        if plan.seed < 0:
            raise ConfigurationError(f"seed {plan.seed} must be 0 or more")
        return plan

    def fingerprint(self, data: Dataset) -> str:
        """Names what a resumed round must have in common with the one that was cut off."""
        fixed = [self.epochs, self.learning_rate, self.batch_size, self.warmup_steps, self.clip_norm, self.seed]
        return hashlib.sha256(json.dumps([fixed, data.fingerprint()]).encode()).hexdigest()


def finetune(
    session: DeviceSession,
    local_data: LocalData | Dataset,
    validation: LocalData | Dataset | None,
    callbacks: Sequence[Callback],
    loss_fn: LossFn | None,
    resume: bool,
    **settings: Any,
) -> FinetuneReport:
    """One local round on the session's own state, with its history as a report."""
    if settings["learning_rate"] is None:
        low = session.placement.inline and session.settings.spec.rank_down <= LOW_RANK
        settings["learning_rate"] = RATE_OF_LOW_RANK if low else RATE_OF_HIGH_RANK
    if settings["patience"] is not None and validation is None:
        raise ConfigurationError("patience needs validation data to look at; pass validation=")
    config = ConfigRecord({name: value for name, value in settings.items() if value is not None} | {"resume": resume})
    if Plan.read(config).learning_rate == 0:
        raise ConfigurationError("learning_rate 0 would train nothing; give one above 0, or none")
    history: list[StepRecord] = []
    metrics = local_round(
        config,
        session.state(),
        session=session,
        data=local_data,
        validation=validation,
        loss_fn=loss_fn,
        callbacks=(lambda record: history.append(record), *callbacks),
    )
    numbers = cast(dict[str, Any], dict(metrics))
    return FinetuneReport(
        history=tuple(history),
        validation=tuple(numbers.get("validation", [])),
        steps=numbers["steps"],
        tokens=numbers["tokens"],
        seconds=numbers["seconds"],
        tokens_per_s=numbers["tokens"] / numbers["seconds"],
        bytes_up=numbers["bytes_up"],
        bytes_down=numbers["bytes_down"],
        stopped=STOPPED[numbers["stopped"]],
        retry_after_s=numbers.get("retry_after_s"),
    )


def local_round(
    config: ConfigRecord,
    state: RecordDict,
    *,
    session: DeviceSession,
    data: LocalData | Dataset,
    validation: LocalData | Dataset | None = None,
    loss_fn: LossFn | None = None,
    callbacks: Sequence[Callback] = (),
) -> MetricRecord:
    """Train on local data from `state`, and leave the result in it.

    Parameters
    ----------
    config : fields of `Plan`; what is left out has its default.
    state : what `DeviceSession.state()` gave, here or in an earlier round; changed in place.

    Returns
    -------
    MetricRecord : loss (last step), steps, tokens, seconds, bytes_up, bytes_down, stopped (index into `STOPPED`),
        examples, validation where there was any, and retry_after_s where a quota stopped it.
    """
    plan = Plan.read(config)
    examples = session.examples(data)
    held_out = session.examples(validation) if validation is not None else None
    session.load_state(state)
    begun = _first_step(plan, examples, session)
    round_ = _Round(plan, session, examples, held_out, loss_fn, callbacks, begun)
    try:
        round_.run()
    finally:
        state.update(session.state())
    return round_.metrics()


def _first_step(plan: Plan, data: Dataset, session: DeviceSession) -> int:
    """Steps that are done already: 0, unless an earlier round of the same plan and data was cut off."""
    fingerprint = plan.fingerprint(data)
    progress = session.progress
    if not plan.resume or not progress:
        session.progress = {"step": 0, "fingerprint": fingerprint, "finished": False}
        session.optimizer.state.clear()
        return 0
    if progress["finished"]:
        raise ConfigurationError("the last fine-tune finished, so there is nothing to resume; run without resume")
    if progress["fingerprint"] != fingerprint:
        raise ConfigurationError(
            "the data or the settings are not those of the fine-tune that was cut off; repeat them, or run "
            "without resume"
        )
    return int(progress["step"])


class _Round:
    """A round under way: the loop, its budgets and what it has measured."""

    def __init__(
        self,
        plan: Plan,
        session: DeviceSession,
        data: Dataset,
        held_out: Dataset | None,
        loss_fn: LossFn | None,
        callbacks: Sequence[Callback],
        begun: int,
    ) -> None:
        self.plan, self.session, self.data, self.held_out = plan, session, data, held_out
        self.loss_fn, self.callbacks, self.begun = loss_fn, callbacks, begun
        self.steps_an_epoch = math.ceil(len(data.examples) / plan.batch_size)
        self.total_steps = plan.epochs * self.steps_an_epoch
        self.step, self.tokens, self.loss = begun, 0, math.nan
        self.validation: list[float] = []
        self.stopped = STOPPED.index("finished")
        self.retry_after_s: float | None = None
        self._best: tuple[float, RecordDict] | None = None
        self._worse = 0
        count = session.remote.count
        self._bytes_before = count.payload_up, count.payload_down
        self._started = time.perf_counter()

    def run(self) -> None:
        """Every epoch's batches from where the round begins, until the plan, a budget or a quota ends."""
        replay = self.session.replay
        replay.waits_for_quota = self.plan.wait_for_quota
        try:
            self._epochs()
        except QuotaError as spent:  # the step that met it has changed nothing
            self.retry_after_s = spent.retry_after_s
            if self.step < self.total_steps:  # else only its validation is missing
                self._stop("quota")
        finally:
            replay.waits_for_quota = False

    def _epochs(self) -> None:
        for epoch in range(self.begun // self.steps_an_epoch, self.plan.epochs):
            order = batches(self.data.examples, self.plan.batch_size, self.plan.seed, epoch)
            for rows in order[self.step - epoch * self.steps_an_epoch :]:
                if self._train(epoch, rows):
                    return
            if self.held_out is not None and self._validate():
                return

    def metrics(self) -> MetricRecord:
        up, down = self._bytes()
        numbers: dict[str, Any] = {
            "loss": self.loss,
            "steps": self.step - self.begun,
            "tokens": self.tokens,
            "seconds": self._seconds,
            "bytes_up": up,
            "bytes_down": down,
            "stopped": self.stopped,
            "examples": len(self.data.examples),
        }
        if self.retry_after_s is not None:
            numbers["retry_after_s"] = self.retry_after_s
        return MetricRecord(numbers | ({"validation": self.validation} if self.validation else {}))

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _bytes(self) -> tuple[int, int]:
        count = self.session.remote.count
        return count.payload_up - self._bytes_before[0], count.payload_down - self._bytes_before[1]

    def _train(self, epoch: int, rows: Sequence[int]) -> bool:
        """One optimizer step, saved; True if the round ends here."""
        rate = self._rate()
        result = self.session.forward_backward([self.data.examples[row] for row in rows], self.loss_fn)
        self.session.optim_step(rate, self.plan.clip_norm)
        self.step += 1
        self.tokens += result.tokens
        self.loss = result.loss
        self.session.progress |= {"step": self.step, "finished": self.step == self.total_steps}
        self.session.checkpoint()
        up, down = self._bytes()
        a_step = self._seconds / (self.step - self.begun)
        record = StepRecord(
            step=self.step,
            total_steps=self.total_steps,
            epoch=epoch,
            loss=result.loss,
            tokens=result.tokens,
            tokens_per_s=self.tokens / self._seconds,
            bytes_up=up,
            bytes_down=down,
            learning_rate=rate,
            seconds=self._seconds,
            eta_s=a_step * (self.total_steps - self.step),
        )
        wants_stop = [callback(record) for callback in self.callbacks]
        if self.step == self.total_steps:
            return False
        if any(wants_stop):
            return self._stop("callback")
        if self.plan.max_seconds and self._seconds >= self.plan.max_seconds:
            return self._stop("time budget")
        if self.plan.max_bytes and up + down >= self.plan.max_bytes:
            return self._stop("byte budget")
        return False

    def _validate(self) -> bool:
        """Held-out loss after an epoch; True if it has not improved for `patience` epochs. Keeps the best adapter."""
        assert self.held_out is not None
        loss = self.session.evaluate(self.held_out).loss
        self.validation.append(loss)
        if not self.plan.patience:
            return False
        if self._best is None or loss < self._best[0]:
            self._best, self._worse = (loss, self.session.state()), 0
        else:
            self._worse += 1
        gave_up = self._worse >= self.plan.patience
        if gave_up or self.step == self.total_steps:
            self.session.load_state(self._best[1])
            self.session.progress["finished"] = True
            self.session.checkpoint()
        return gave_up and self._stop("early stopping")

    def _rate(self) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = min(self.plan.warmup_steps, self.total_steps // 2)
        if self.step < warmup:
            return self.plan.learning_rate * (self.step + 1) / warmup
        share = (self.step - warmup) / (self.total_steps - warmup)
        return self.plan.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def _stop(self, reason: str) -> bool:
        self.stopped = STOPPED.index(reason)
        return True
