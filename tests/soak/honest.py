"""Honest devices of the soak: complete `DeviceSession`s that generate and train, and check every step they begin.

`references` runs every piece of work alone, before the crowd comes. `live` then does pieces at random until its time is
over: a step is a decoded token, whose logits must be those of the reference, or a training pass, whose loss and every
gradient must be. Some have a bad network, which breaks in mid-layer, and some a user who reads for longer than the
service waits; both must lose nothing, by replay. How the service ends a connection is noted on the wire (`Watched`).
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privatelora.device import DeviceSession, exchange
from privatelora.device.connection import Connection
from privatelora.device.data import IGNORE, Example
from privatelora.protocol.errors import ConnectionLostError, PrivateLoraError, ServiceError
from privatelora.protocol.frames import Frame, Kind
from privatelora.protocol.messages import ErrorInfo, parse

PLACEMENTS = ("paper", "inline=1+4", "first=1,last=1,inline=2+3", "one-trip", "last=3")
PROMPTS = (16, 32)  # tokens; multiples of a few lengths, so that the service has seen every shape after the warm-up
NEW_TOKENS = 24
BATCHES = ((16, 16), (16, 32, 16))  # tokens of the sequences of a training pass
RANK = 8
TOLERANCE = 1e-4  # norm(a - b) / norm(b) of logits and of every gradient, float32
SHAKY, SLEEPY = 0.15, 0.06  # of the honest ones
BREAK = 0.04  # of a shaky device's answers in mid-layer


@dataclass(frozen=True)
class Place:
    """Where the service is, and a folder for what devices keep, which is thrown away."""

    url: str
    token: str
    folder: Path
    idle_timeout_s: float


@dataclass(frozen=True)
class Trained:
    """What a training pass must give."""

    loss: float
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class References:
    """What a placement's pieces of work give alone: logits (NEW_TOKENS, vocab) after each prompt, and passes."""

    texts: list[tuple[list[int], Tensor]]  # prompt and the tokens after it; logits
    passes: list[tuple[list[Example], Trained]]


@dataclass
class Findings:
    """What one device has to tell in the end.

    begun, done : steps; the difference is lost. replayed : how often it had to connect again.
    wrong : what was not as it must be, in words.
    refusals : codes that the service ended sessions with. uncoded : endings without a good code, in words.
    """

    begun: int = 0
    done: int = 0
    replayed: int = 0
    wrong: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    uncoded: list[str] = field(default_factory=list)

    def refused(self, code: str, message: str) -> None:
        if code in (ServiceError.code, PrivateLoraError.code):
            self.uncoded.append(f"{code}: {message}")
        else:
            self.refusals.append(code)


def references(place: Place, seed: int) -> dict[str, References]:
    """Every piece of work at every placement, with nobody else at the service."""
    return {placement: _reference(place, placement, seed) for placement in PLACEMENTS}


def live(place: Place, placement: str, expected: References, seconds: float, seed: int) -> Findings:
    """Do pieces of work, until the time is over; a step that is under way then is finished."""
    found, chance = Findings(), random.Random(seed)
    manner = chance.random()
    exchange.Connection = _watched(found)
    try:
        with _session(place, placement) as me:
            until = time.monotonic() + seconds
            if manner < SHAKY:
                _shake(me, chance)
            nap_s = 1.3 * place.idle_timeout_s if SHAKY <= manner < SHAKY + SLEEPY else 0.0
            while not found.begun or time.monotonic() < until:
                if nap_s or chance.random() < 0.6:
                    _generate(me, chance.choice(expected.texts), until, found, chance, nap_s)
                    nap_s = 0.0
                else:
                    _train(me, chance.choice(expected.passes), found)
    except PrivateLoraError as error:
        found.wrong.append(f"{placement} gave up: {error.code}: {error}")
    return found


def _generate(
    me: DeviceSession,
    text: tuple[list[int], Tensor],
    until: float,
    found: Findings,
    chance: random.Random,
    nap_s: float,
) -> None:
    """Decode some tokens after a prompt, as `DeviceSession.stream` does; the user reads the first for `nap_s`."""
    tokens, logits = text
    count = chance.randint(1, NEW_TOKENS)
    history = tokens[: len(tokens) - NEW_TOKENS]
    decoding = me.split.decode(history)
    try:
        for at in range(count):
            found.begun += 1
            came = me.replay.run(decoding.next_logits, decoding.restart)
            if _check(f"{me.placement} token {at} after {len(tokens)}", came, logits[at], found):
                found.done += 1
            history.append(tokens[len(history)])
            if not at:
                time.sleep(nap_s)
            if time.monotonic() >= until:
                break
    finally:
        decoding.close()
        me.replay.release([decoding.sequence])


def _train(me: DeviceSession, work: tuple[list[Example], Trained], found: Findings) -> None:
    batch, expected = work
    found.begun += 1
    came = _forward_backward(me, batch)
    right = _check("loss", torch.tensor(came.loss), torch.tensor(expected.loss), found)
    if came.gradients.keys() != expected.gradients.keys():
        found.wrong.append(f"gradients of {sorted(came.gradients)} came, of {sorted(expected.gradients)} are due")
        right = False
    for name, gradient in expected.gradients.items():
        right = _check(f"{me.placement} gradient of {name}", came.gradients[name], gradient, found) and right
    found.done += right


def _check(what: str, came: Tensor, due: Tensor, found: Findings) -> bool:
    difference = float((came - due).norm() / due.norm())
    if not difference <= TOLERANCE:
        found.wrong.append(f"{what} differs by {difference:.1e}")
    return difference <= TOLERANCE


def _forward_backward(me: DeviceSession, batch: list[Example]) -> Trained:
    loss = me.forward_backward(batch).loss
    gradients = {name: p.grad.clone() for name, p in me.adapter.named_parameters() if p.grad is not None}
    me.optimizer.zero_grad()
    return Trained(loss, gradients)


def _reference(place: Place, placement: str, seed: int) -> References:
    generator = np.random.default_rng(seed)
    with _session(place, placement) as me:
        vocabulary = me.config.vocab_size
        texts = []
        for length in PROMPTS:
            tokens: list[int] = generator.integers(0, vocabulary, length + NEW_TOKENS).tolist()
            history, logits = tokens[:length], []
            decoding = me.split.decode(history)
            for token in tokens[length:]:
                logits.append(decoding.next_logits().clone())
                history.append(token)
            decoding.close()
            me.replay.release([decoding.sequence])
            texts.append((tokens, torch.stack(logits)))
        passes = []
        for lengths in BATCHES:
            batch = [_example(generator, length, vocabulary) for length in lengths]
            passes.append((batch, _forward_backward(me, batch)))
    return References(texts, passes)


def _example(generator: np.random.Generator, length: int, vocabulary: int) -> Example:
    tokens = generator.integers(0, vocabulary, length)
    return Example(tokens, np.append(tokens[1:], IGNORE))


@contextmanager
def _session(place: Place, placement: str) -> Iterator[DeviceSession]:
    """A device with a random adapter, the same in every session of a placement; its store is thrown away with it."""
    with (
        TemporaryDirectory(dir=place.folder) as folder,
        DeviceSession(
            place.url,
            token=place.token,
            placement=placement,
            rank=RANK,
            micro_batches=2,
            store_dir=folder,
            cache_dir=place.folder / "cache",
        ) as me,
    ):
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in me.adapter.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        yield me


# -- the wire, watched -------------------------------------------------------------------------------------------------


def _shake(me: DeviceSession, chance: random.Random) -> None:
    """A network that breaks in mid-layer, and between two passes where nothing is inline."""
    delta, run = me.adapter.delta, me.replay.run

    def break_off() -> None:
        connection: Any = me.remote._connection
        if connection is not None and chance.random() < BREAK:
            connection.break_off()

    def delta_on_a_bad_network(layer: int, u: Tensor) -> Tensor:
        break_off()
        return delta(layer, u)

    def run_on_a_bad_network(*arguments: Any) -> Any:
        break_off()
        return run(*arguments)

    me.adapter.delta = delta_on_a_bad_network  # type: ignore[method-assign]  # that is the fault
    me.replay.run = run_on_a_bad_network  # type: ignore[method-assign]  # that is the fault


def _watched(found: Findings) -> type[Connection]:
    """The device's own connection, which notes how it ends; each end but its own is one replay."""

    class Watched(Connection):
        told: ErrorInfo | None = None
        ours = False  # we ended it ourselves

        def __init__(self, *arguments: Any) -> None:
            try:
                super().__init__(*arguments)
            except PrivateLoraError as error:
                self.ours = True
                found.replayed += 1
                if isinstance(error, ConnectionLostError):
                    found.uncoded.append(f"at the door: {error}")
                else:
                    found.refused(error.code, error.message)
                raise

        def send(self, frame: Frame) -> None:
            try:
                super().send(frame)
            except PrivateLoraError as error:
                self._note(error)
                raise

        def receive(self) -> Frame:
            try:
                return super().receive()
            except PrivateLoraError as error:
                self._note(error)
                raise

        def close(self) -> None:
            self.ours = True
            super().close()

        def break_off(self) -> None:
            self.ours = True
            found.replayed += 1
            self._socket.shutdown(socket.SHUT_RDWR)

        def _next(self) -> Frame:
            frame = super()._next()
            if frame.kind is Kind.ERROR:
                self.told = parse(frame.payload, ErrorInfo)
            return frame

        def _note(self, error: PrivateLoraError) -> None:
            if self.ours:
                return
            self.ours = True  # once
            found.replayed += 1
            if self.told is not None:
                found.refused(self.told.code, self.told.message)
            else:
                found.uncoded.append(f"an honest device: {error}")

    return Watched
