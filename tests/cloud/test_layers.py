"""A batch's passes may go on in any order: each gets what belongs to its own rows, on the way forth and back."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.fleet import DEPTH, Fleet

from privatelora.cloud.backbone import Backbone
from privatelora.cloud.layers import LayerRunner
from privatelora.cloud.passes import Account, Batch, Pass, Point, Stage, Way
from privatelora.cloud.payloads import exchanges
from privatelora.protocol.adapter import AdapterSpec
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.placement import Placement

HIDDEN, RANK, TOKENS = 64, 4, 5
PLACEMENT = Placement.named("paper", DEPTH)


@pytest.fixture(scope="module")
def backbone(fleet: Fleet) -> Backbone:
    fleet.service("llama")  # has published the model and its sets
    return Backbone.load(str(fleet.source("llama")), fleet.data_dir("llama"), torch.float32)


class Devices:
    """Passes that are computed together, and devices of one adapter set that answer with numbers of their own."""

    def __init__(self, backbone: Backbone, seeds: list[int]) -> None:
        self.runner = LayerRunner(backbone.config, backbone.layers, backbone.tables, backbone.device, backbone.dtype)
        weights = backbone.inline_weights(backbone.default_sets["calibrated"], AdapterSpec("calibrated", RANK, RANK))
        owner: Any = SimpleNamespace(account=Account(), closed=False)
        self.random: dict[Pass, np.random.Generator] = {}
        for seed in seeds:
            one = Pass(owner, PLACEMENT, weights, Way.TRAIN, (TOKENS,), (0,), None, None, DEPTH, WireDtype.FLOAT32)
            self.random[one] = np.random.default_rng(seed)
            self._answer(one, (TOKENS, HIDDEN))

    def train(self, turn: bool = False, apart: bool = False) -> list[bytes]:
        """Everything that each device was told, forth and back.

        turn : its neighbours answer in turns; apart : every other unit is computed by a thread for each pass, all at
        once and while what needs no answer is still computed for the batch that they were in before.
        """
        told = dict.fromkeys(self.random, b"")
        point, passes = Point(Way.TRAIN, Stage.ENTER, 0), list(self.random)
        ahead: list[Batch] = []
        for unit in itertools.count():
            parts = [[one] for one in passes] if apart and unit % 2 else [passes]
            with ThreadPoolExecutor(len(passes) + 1) as threads:
                before = [threads.submit(self.runner.ahead, batch) for batch in ahead]
                done = list(threads.map(lambda part, at=point: self.runner.run(at, part), parts))
                for one_ahead in before:
                    one_ahead.result()
            ahead = [one.ahead for one in done if one.ahead is not None]
            answers = [exchange for one in done for reply in one.replies for exchange in exchanges(reply)]
            assert len(answers) == len(passes)
            for one, _, data, _, _ in answers:
                told[one] += bytes(data)
            if answers[0].due is None:
                return list(told.values())
            for one, _, _, due, _ in answers:
                assert due is not None
                self._answer(one, due.shape)
                point = due.point
            passes = passes[1:] + passes[:1] if turn else passes
        raise AssertionError

    def _answer(self, one: Pass, shape: tuple[int, ...]) -> None:
        one.answer_shape = shape
        one.answer = (0.1 * self.random[one].standard_normal(shape)).astype(np.float32).tobytes()


@pytest.mark.parametrize("how", ["turn", "apart"])
def test_answers_in_another_order_belong_to_their_own_rows(backbone: Backbone, how: str) -> None:
    seeds = [1, 2, 3]
    alone = [Devices(backbone, [seed]).train()[0] for seed in seeds]
    together = Devices(backbone, seeds).train(**{how: True})
    for mine, own in zip(together, alone, strict=True):
        found, due = np.frombuffer(mine, np.float32), np.frombuffer(own, np.float32)
        assert np.linalg.norm(found - due) < 1e-5 * np.linalg.norm(due)
