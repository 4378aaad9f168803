"""What these tests share: a service with small limits and two users, and a healthy session beside every attack."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from tests.support.fleet import Fleet
from tests.support.service import ServiceProcess, plane
from tests.support.wire import announced

from privatelora.cloud.sets import SetStore, random_set
from privatelora.decoder.config import load_config
from privatelora.device import DeviceSession
from privatelora.protocol.messages import ServiceInfo

TOKENS = {"alice": "alice-token", "mallory": "mallory-token"}
LIMITS = {"max_sessions": 12, "max_waiting": 0, "max_streams": 3, "max_sequences": 4, "max_tokens_per_step": 2048}
PLACEMENTS = ("paper", "one-trip", "first=0,last=2")
OTHER_MODEL = "f" * 64  # a model whose set lies in the same folder


@dataclass(frozen=True)
class Target:
    """A running service, and what it announces."""

    running: ServiceProcess
    info: ServiceInfo
    foreign_set: str  # of another model

    @property
    def url(self) -> str:
        return self.running.url


class Bystander:
    """Alice's healthy session: a stream of text that goes on through all attacks, and a training pass beside it.

    Every number of it must be the same, bit for bit, as before the attacks began. It does not retry, so that a session
    that the service dropped cannot come back unnoticed.
    """

    def __init__(self, me: DeviceSession) -> None:
        assert me.replay.retry_s == 0
        self.me = me
        make_random(me)
        self.batch = me.examples(["the quick brown fox", "jumps over"]).examples
        self.text = me.generate("once upon", max_new_tokens=400)
        self.gradients = self._gradients()
        self._begin()

    def assert_untouched(self) -> None:
        """Some more of the text, and a training pass."""
        piece = next(self.stream, None)
        if piece is None:
            assert self.seen == self.text
            self._begin()
        else:
            self.seen += piece
            assert self.text.startswith(self.seen)
        assert torch.equal(self._gradients(), self.gradients)

    def _begin(self) -> None:
        self.stream, self.seen = self.me.stream("once upon", max_new_tokens=400), ""

    def _gradients(self) -> torch.Tensor:
        """Loss and every gradient of a training pass, in one tensor."""
        loss = self.me.forward_backward(self.batch).loss
        gradients = [p.grad.flatten() for p in self.me.adapter.parameters() if p.grad is not None]
        self.me.optimizer.zero_grad()
        assert all(bool(gradient.any()) for gradient in gradients)
        return torch.cat([torch.tensor([loss]), *gradients])


@pytest.fixture(scope="package")
def target(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    fleet.service("llama")  # has published the model and its sets
    data_dir = tmp_path_factory.mktemp("target") / "data"
    shutil.copytree(fleet.data_dir("llama"), data_dir)
    config = load_config(fleet.source("llama") / "config.json")
    foreign = SetStore(data_dir / "sets").publish(random_set(config, 8, seed=9), "random", OTHER_MODEL)
    settings = {"placements": PLACEMENTS, **LIMITS}
    with plane(fleet.source("llama"), data_dir, TOKENS, **settings) as running:
        yield Target(running, announced(running.url, TOKENS["alice"]), foreign.sha256)


@pytest.fixture(scope="package")
def bystander(fleet: Fleet, target: Target) -> Iterator[Bystander]:
    with fleet.connect(target.running, token=TOKENS["alice"], placement="paper", rank=8, retry_s=0.0) as me:
        yield Bystander(me)


def make_random(me: DeviceSession) -> None:
    """An adapter that makes a difference, the same in every session of a placement."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in me.adapter.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
