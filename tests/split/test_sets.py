"""Numbers do not depend on which published set is the newest: a device's M keeps the set that it was made for.

The newest set, an older one and one of another kind are held against transformers' own model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tests.split.common import MIXED, assert_equal_generation, assert_equal_gradients, make_random, random_examples
from tests.support.fleet import DEPTH, Fleet
from tests.support.reference import reference
from tests.support.service import service

from privatelora.cloud.sets import SetLayer, SetStore
from privatelora.device import DeviceSession

LENGTHS = (40, 9, 23)


def test_old_and_new_sets_give_the_numbers_of_the_whole_model(fleet: Fleet, tmp_path: Path) -> None:
    data_dir, store = tmp_path / "data", tmp_path / "store"
    with service(fleet.source("qwen3"), data_dir) as running:
        with fleet.connect(running, name="old", store_dir=store, placement="paper", rank=(20, 12)) as old:
            make_random(old)
            old.checkpoint()
            old_set, model_hash = old.identity.set_hash, old.identity.model_hash
        new_set = publish_another(data_dir, model_hash)
        running.stop()
        running.start()

        with fleet.connect(running, name="old", store_dir=store) as old:
            assert old.identity.set_hash == old_set
            assert_equal_to_the_whole_model(fleet, old, data_dir)
        with fleet.connect(running, placement="paper", rank=(20, 12)) as new:
            assert new.identity.set_hash == new_set
            make_random(new)
            assert_equal_to_the_whole_model(fleet, new, data_dir)
        with fleet.connect(running, placement=MIXED, adapter="random", rank=(7, 9)) as other:
            make_random(other)
            assert_equal_to_the_whole_model(fleet, other, data_dir)


def assert_equal_to_the_whole_model(fleet: Fleet, me: DeviceSession, data_dir: Path) -> None:
    with reference(fleet.model("qwen3"), me, data_dir) as whole:
        assert_equal_gradients(me, whole, random_examples(LENGTHS, me.config.vocab_size))
        assert_equal_generation(me, whole, ("The door code is 4071, I think",), 8)


def publish_another(data_dir: Path, model_hash: str) -> str:
    """Publish a further set of the calibrated kind, as a later release or another service might make it."""
    generator = torch.Generator().manual_seed(5)

    def rows(count: int, width: int) -> torch.Tensor:
        return torch.randn(count, width, generator=generator) / width**0.5

    layers = {
        l: SetLayer(rows(48, 64)[None], {"q": rows(32, 128), "k": rows(32, 64), "v": rows(32, 64)})
        for l in range(DEPTH)
    }
    return SetStore(data_dir / "sets").publish(layers, "calibrated", model_hash).sha256
