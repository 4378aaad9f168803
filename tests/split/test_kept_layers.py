"""Activations that are kept and those that are computed again lead to the same gradients, and take what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.split.common import E3, MIXED, ONE_TRIP, PAPER, SUBSET, make_random, random_examples
from tests.support.fleet import DEPTH, Fleet
from tests.support.inside import serving
from tests.support.reference import difference

from privatelora.cloud.backbone import Backbone
from privatelora.device import DeviceSession
from privatelora.device.batch import Batch

PLACEMENTS = (PAPER, SUBSET, MIXED, ONE_TRIP)


@pytest.fixture(scope="module")
def backbone(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(fleet.source("qwen3"), tmp_path_factory.mktemp("kept"), torch.float32)


def test_gradients_are_the_same_however_many_layers_are_kept(fleet: Fleet, backbone: Backbone, tmp_path: Path) -> None:
    found: dict[tuple[str, int | None], dict[str, torch.Tensor]] = {}
    peaks: dict[tuple[str, int | None], int] = {}
    for kept in (None, 0, 3, DEPTH):
        with serving(backbone, kept_layers=kept) as (plane, url):
            for placement in PLACEMENTS:
                settings = {"placement": placement, "store_dir": tmp_path / f"{kept}-{placement}", **E3}
                with DeviceSession(url, token="t", cache_dir=fleet.folder / "cache", **settings) as me:
                    make_random(me)
                    batch = Batch.of(random_examples((30, 7, 12), me.config.vocab_size))

                    def loss(logits: torch.Tensor, labels: torch.Tensor, of: tuple[str, int | None]) -> torch.Tensor:
                        peaks[of] = plane.memory.used_bytes  # between forth and back
                        return torch.nn.functional.cross_entropy(logits, labels)

                    of = placement, kept
                    _, found[of] = me.split.forward_backward(
                        batch,
                        lambda x, y, of=of: loss(x, y, of),  # type: ignore[misc]  # mypy infers no default
                    )
            assert plane.memory.used_bytes == 0
    for (placement, kept), gradients in found.items():
        whole = found[placement, None]
        assert max(difference(gradients[name], whole[name]) for name in whole) < 1e-6, (placement, kept)
    for placement in PLACEMENTS:
        assert peaks[placement, 0] < peaks[placement, 3] < peaks[placement, DEPTH] == peaks[placement, None]
    assert peaks[PAPER, 0] < 0.6 * peaks[PAPER, None]
