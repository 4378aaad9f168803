"""Split generation gives the tokens and the logits of transformers' own model with the same adapter.

Prefill and cached decoding go over the real socket, several sequences in turns, past the sliding windows (20 and 24
tokens) and the original contexts (64). The reference has its logits from whole sequences and its tokens by `generate`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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
    TOLERANCE,
    Adapter,
    assert_equal_generation,
    make_random,
)
from tests.support.fleet import SMOLLM2, Fleet
from tests.support.reference import difference, reference
from tests.support.service import plane

from privatelora.decoder.ragged import KVCache
from privatelora.device import DeviceSession
from privatelora.device.stream import Span
from privatelora.protocol.frames import Phase

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


@pytest.mark.parametrize(("model", "placement"), [("mistral-yarn", PAPER), ("qwen3", MIXED)])
def test_a_ragged_batch_decodes_as_the_whole_model_does(fleet: Fleet, model: str, placement: str) -> None:
    """Sequences of unequal lengths go through each pass together: one prefill, then one token of each a pass."""
    with fleet.session(model, placement=placement, **E1) as me:
        make_random(me)
        histories = [me.encode(prompt) for prompt in PROMPTS]
        caches = [me.model.caches() for _ in histories]
        done = [0] * len(histories)
        with reference(fleet.model(model), me, fleet.data_dir(model)) as whole, torch.no_grad():
            for _ in range(6):
                logits = run_together(me, histories, done, caches)
                for row, history in zip(logits, histories, strict=True):
                    assert difference(row, whole.logits(history)[-1]) < TOLERANCE
                    history.append(int(row.argmax()))


def run_together(
    me: DeviceSession, histories: list[list[int]], done: list[int], caches: list[tuple[KVCache, KVCache]]
) -> torch.Tensor:
    """Logits (sequences, vocab) after the histories; runs all of their new tokens in one pass and counts them done."""
    fresh = [history[start:] for history, start in zip(histories, done, strict=True)]
    lengths = [len(tokens) for tokens in fresh]
    lasts = torch.tensor(lengths).cumsum(0) - 1
    first, last = ([pair[end] for pair in caches] for end in (0, 1))
    spans = [Span(number, *place) for number, place in enumerate(zip(done, lengths, strict=True))]
    h = me.model.enter(
        torch.cat([torch.tensor(tokens) for tokens in fresh]), me.model.ragged(lengths, done, first), me.adapter
    )
    h = me.remote.forward(h, spans, Phase.GENERATE, me.adapter, lasts)
    rows = lasts if me.placement.last else None  # without last layers only these rows come back
    logits = me.model.logits(me.model.leave(h, me.model.ragged(lengths, done, last), me.adapter, rows))
    done[:] = [len(history) for history in histories]
    return logits


def test_a_prompt_longer_than_a_step_is_prefilled_in_pieces(fleet: Fleet, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    limited = plane(fleet.source("mistral-yarn"), data_dir, {"owner": "t"}, max_tokens_per_step=16)
    with limited as running, fleet.connect(running, placement=MIXED, **E1) as me:
        make_random(me)
        with reference(fleet.model("mistral-yarn"), me, data_dir) as whole:
            assert_equal_generation(me, whole, PROMPTS, 10)
