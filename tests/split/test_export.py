"""An exported adapter is its owner's: the real `peft` on the whole model computes what the split session computes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from peft import PeftModel
from tests.split.common import (
    E1,
    E1_MLP,
    E3,
    FULL,
    MIXED,
    NARROW,
    ONE_TRIP,
    PAPER,
    PROMPTS,
    SUBSET_FIRST,
    Adapter,
    assert_equal_generation,
    make_random,
)
from tests.support.fleet import SMOLLM2, Fleet
from tests.support.reference import Reference

from privatelora.protocol.errors import ConfigurationError

CASES = [
    ("llama-llama3", PAPER, FULL),
    ("llama", PAPER, E3),
    ("llama", SUBSET_FIRST, NARROW),
    ("mistral-yarn", ONE_TRIP, {"lora_rank": 4, "lora_alpha": 10.0}),
    ("qwen2-linear", MIXED, E3),
    ("qwen3", MIXED, E1),
]


@pytest.mark.parametrize(("model", "placement", "adapter"), CASES, ids=str)
def test_peft_computes_what_the_split_session_computes(
    fleet: Fleet, tmp_path: Path, model: str, placement: str, adapter: Adapter
) -> None:
    with fleet.session(model, placement=placement, **adapter) as me:
        make_random(me)
        me.export_peft(tmp_path)
        whole = PeftModel.from_pretrained(copy.deepcopy(fleet.model(model)), tmp_path).eval()
        assert_equal_generation(me, Reference(whole, {}), PROMPTS, 20)


def test_peft_computes_what_the_split_session_computes_on_real_weights(fleet: Fleet, tmp_path: Path) -> None:
    with fleet.session(SMOLLM2, placement="first=1,last=2,inline=3+11+20") as me:
        make_random(me, spread=0.03)
        me.export_peft(tmp_path)
        whole = PeftModel.from_pretrained(fleet.model(SMOLLM2), tmp_path).eval()
        try:
            assert_equal_generation(me, Reference(whole, {}), ("The history of the steam engine is",), 10)
        finally:
            whole.unload()  # the model is shared


def test_an_mlp_m_is_refused_with_the_reason(fleet: Fleet, tmp_path: Path) -> None:
    with (
        fleet.session("llama", placement=PAPER, **E1_MLP) as me,
        pytest.raises(ConfigurationError, match=r"'mlp' M is not linear.*m_kind='linear'"),
    ):
        me.export_peft(tmp_path / "out")
    assert not (tmp_path / "out").exists()
