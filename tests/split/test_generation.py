"""Split generation gives the tokens and the logits of transformers' own model with the same adapter.

Prefill and cached decoding go over the real socket, several sequences in turns, past the sliding windows (20 and 24
tokens) and the original contexts (64). The reference has its logits from whole sequences and its tokens by `generate`.
"""

from __future__ import annotations

import pytest
from tests.split.common import (
    E1,
    E1_MLP,
    E3,
    LAST,
    MIXED,
    ONE_TRIP,
    PAPER,
    PROMPTS,
    SUBSET_FIRST,
    Adapter,
    assert_equal_generation,
    make_random,
)
from tests.support.fleet import SMOLLM2, Fleet
from tests.support.reference import reference

CASES = [
    ("llama", PAPER, E3),
    ("llama", ONE_TRIP, E1),
    ("llama", LAST, E1),
    ("llama-llama3", SUBSET_FIRST, E1_MLP),
    ("mistral-yarn", PAPER, E1),
    ("mistral-yarn", MIXED, E1_MLP),
    ("qwen2-linear", PAPER, E1),
    ("qwen2-linear", MIXED, E3),
    ("qwen3", PAPER, E1),
    ("qwen3", MIXED, E1_MLP),
]


@pytest.mark.parametrize(("model", "placement", "adapter"), CASES, ids=str)
def test_greedy_tokens_and_logits_equal_transformers(
    fleet: Fleet, model: str, placement: str, adapter: Adapter
) -> None:
    with fleet.session(model, placement=placement, **adapter) as me:
        make_random(me)
        with reference(fleet.model(model), me, fleet.data_dir(model)) as whole:
            assert_equal_generation(me, whole, PROMPTS, 30)


@pytest.mark.parametrize(("placement", "adapter"), [(PAPER, {"rank": 64}), ("few-trips", {"m_kind": "mlp"})], ids=str)
def test_greedy_tokens_and_logits_equal_transformers_on_real_weights(
    fleet: Fleet, placement: str, adapter: Adapter
) -> None:
    with fleet.session(SMOLLM2, placement=placement, **adapter) as me:
        make_random(me, spread=0.03)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        chat = me.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        with reference(fleet.model(SMOLLM2), me, fleet.data_dir(SMOLLM2)) as whole:
            assert_equal_generation(me, whole, ("The history of the steam engine is", chat), 12)
