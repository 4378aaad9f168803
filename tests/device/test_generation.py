"""Choosing tokens and turning them into text: sampling, the nucleus, stop strings and incremental decoding.

The first half tests the plain functions over logits and ids; the second asks a running service, as a user would.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.fleet import Fleet
from tests.support.tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from privatelora.device import DeviceSession
from privatelora.device.generation import Sampler, pieces
from privatelora.protocol.accounting import forward_traffic
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import ConfigurationError

TOKENIZER = tiny_tokenizer()  # one token a byte, so that every character and stop string spans tokens
PROBABILITIES = [0.5, 0.3, 0.15, 0.05]

logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=24)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=24)


# -- tokens -----------------------------------------------------------------------------------------------------------


@given(logits)
def test_temperature_zero_is_greedy(values: list[float]) -> None:
    picked = Sampler(0.0, 0.1, None).pick(torch.tensor(values))
    assert values[picked] == max(values)


@given(logits, st.floats(1e-6, 1.0), st.floats(0.05, 10.0))
def test_sampling_never_leaves_the_nucleus(values: list[float], top_p: float, temperature: float) -> None:
    scaled = np.array(values) / temperature
    probabilities = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    sampler = Sampler(temperature, top_p, seed=1)
    for _ in range(10):
        picked = sampler.pick(torch.tensor(values))
        likelier = probabilities[probabilities > probabilities[picked] * (1 + 1e-4)].sum()
        assert likelier < top_p + 1e-5  # else a smaller set than one with this token reaches top_p


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, 1), (0.5, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)])
def test_the_nucleus_is_the_smallest_that_reaches_top_p(top_p: float, kept: int) -> None:
    sampler = Sampler(1.0, top_p, seed=3)
    drawn = Counter(sampler.pick(torch.tensor(PROBABILITIES).log()) for _ in range(4000))
    assert set(drawn) == set(range(kept))
    for token, count in drawn.items():
        share = PROBABILITIES[token] / sum(PROBABILITIES[:kept])
        assert count / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature: float) -> None:
    sampler = Sampler(temperature, 1.0, seed=5)
    drawn = Counter(sampler.pick(torch.tensor(PROBABILITIES).log()) for _ in range(4000))
    weights = np.array(PROBABILITIES) ** (1 / temperature)
    for token, share in enumerate(weights / weights.sum()):
        assert drawn[token] / 4000 == pytest.approx(share, abs=0.03)


def test_a_temperature_close_to_zero_is_greedy_and_no_overflow() -> None:
    assert Sampler(1e-40, 1.0, seed=0).pick(torch.tensor([1.0, 3.0, 2.0])) == 1


def test_a_seed_makes_sampling_reproducible() -> None:
    flat = torch.zeros(1000)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(1.0, 0.9, seed)
        return [sampler.pick(flat) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.5, float("nan")])
def test_a_top_p_outside_its_range_is_refused(top_p: float) -> None:
    with pytest.raises(ConfigurationError, match=r"top_p .* in \(0, 1\]"):
        Sampler(1.0, top_p, None)


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_a_temperature_outside_its_range_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigurationError, match=r"temperature .* 0 or more"):
        Sampler(temperature, 1.0, None)


# -- text -------------------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_these_tests_has_one_token_a_byte() -> None:
    assert len(list(tokens_of("naïve 🙂"))) == len("naïve 🙂".encode())


@given(texts)
def test_pieces_join_to_the_whole(text: str) -> None:
    assert "".join(pieces(tokens_of(text), TOKENIZER, [])) == text


@given(texts)
def test_no_piece_ends_inside_a_character(text: str) -> None:
    assert all("\ufffd" not in piece for piece in pieces(tokens_of(text), TOKENIZER, []))


def test_a_character_is_held_back_until_it_is_whole() -> None:
    fed = Feed("a🙂b")
    shown = pieces(fed, TOKENIZER, [])
    assert (next(shown), fed.taken) == ("a", 1)
    assert (next(shown), fed.taken) == ("🙂", 5)
    assert (next(shown), fed.taken) == ("b", 6)


def test_a_character_that_never_becomes_whole_is_shown_at_the_end() -> None:
    assert list(pieces(iter(list(tokens_of("a🙂"))[:-1]), TOKENIZER, [])) == ["a", "\ufffd"]


@given(texts)
def test_pieces_join_where_a_tokenizer_marks_every_byte_that_is_not_a_character_yet(text: str) -> None:
    tokenizer = byte_fallback_tokenizer()
    shown = list(pieces(iter(text.encode()), tokenizer, []))
    assert "".join(shown) == text
    assert all("\ufffd" not in piece for piece in shown)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Decodes as Llama 2's does: a run of byte tokens that is no UTF-8 yet becomes one mark a byte. Ids are bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@given(texts, st.text(alphabet="ab🙂é", min_size=1, max_size=3), texts)
def test_text_ends_before_the_first_stop_string(before: str, stop: str, after: str) -> None:
    text = before + stop + after
    assert "".join(pieces(tokens_of(text), TOKENIZER, [stop])) == text[: text.find(stop)]


def test_a_stop_string_is_recognised_across_tokens_and_never_shown_in_part() -> None:
    shown = list(pieces(tokens_of("one STOp STOP two"), TOKENIZER, ["STOP"]))
    assert "".join(shown) == "one STOp "
    assert not any(piece.endswith(("S", "ST", "STO")) for piece in shown if piece != "STOp")


def test_the_start_of_a_stop_string_is_held_back_until_it_is_not_one() -> None:
    fed = Feed("xSTIR")
    shown = pieces(fed, TOKENIZER, ["STOP"])
    assert (next(shown), fed.taken) == ("x", 1)
    assert (next(shown), fed.taken) == ("STI", 4)


def test_the_start_of_a_stop_string_at_the_very_end_is_shown() -> None:
    assert "".join(pieces(tokens_of("a ST"), TOKENIZER, ["STOP"])) == "a ST"


def test_the_stop_string_that_comes_first_wins() -> None:
    assert "".join(pieces(tokens_of("1 blue 2 red 3"), TOKENIZER, ["red", "blue"])) == "1 "


def test_no_token_is_asked_for_after_a_stop_string() -> None:
    fed = Feed("ab#cd")
    assert "".join(pieces(fed, TOKENIZER, ["#"])) == "ab"
    assert fed.taken == 3


class Feed:
    """Tokens of a text, counting how many were taken."""

    def __init__(self, text: str) -> None:
        self._tokens = tokens_of(text)
        self.taken = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        token = next(self._tokens)
        self.taken += 1
        return token


def tokens_of(text: str) -> Iterator[int]:
    return iter(TOKENIZER(text, add_special_tokens=False)["input_ids"])


# -- a running service ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def me(fleet: Fleet) -> Iterator[DeviceSession]:
    with fleet.session("llama", rank=8) as session:
        yield session


def test_greedy_text_is_the_same_every_time(me: DeviceSession) -> None:
    assert me.generate("one two", max_new_tokens=20) == me.generate("one two", max_new_tokens=20)
    assert me.generate("one two", max_new_tokens=20) != me.generate("one three", max_new_tokens=20)


def test_sampled_text_depends_on_its_seed_alone(me: DeviceSession) -> None:
    def sample(seed: int) -> str:
        return me.generate("one two", max_new_tokens=20, temperature=1.0, top_p=0.9, seed=seed)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_streamed_pieces_join_to_the_text(me: DeviceSession) -> None:
    settings = {"max_new_tokens": 40, "temperature": 1.5, "seed": 4}
    streamed = list(me.stream("one two", **settings))
    assert len(streamed) > 10
    assert "".join(streamed) == me.generate("one two", **settings)


def test_a_stop_string_cuts_the_text(me: DeviceSession) -> None:
    text = me.generate("one two", max_new_tokens=40, temperature=1.5, seed=4)
    stop = text[10:13]
    settings = {"max_new_tokens": 40, "temperature": 1.5, "seed": 4}
    assert me.generate("one two", stop=[stop], **settings) == text[: text.find(stop)]
    assert me.generate("one two", stop=stop, **settings) == text[: text.find(stop)]  # one string is a list of one


def test_fewer_tokens_give_the_beginning_of_the_same_text(me: DeviceSession) -> None:
    longer = me.generate("one two", max_new_tokens=30)
    shorter = me.generate("one two", max_new_tokens=10)
    assert longer.startswith(shorter.rstrip("\ufffd"))
    assert shorter != longer


def test_a_chat_is_written_with_the_models_template(me: DeviceSession) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    assert me.encode(chat) == me.encode("<|start|>user: Hello<|end|><|start|>assistant: ")
    assert me.generate(chat, max_new_tokens=8) == me.generate(
        "<|start|>user: Hello<|end|><|start|>assistant: ", max_new_tokens=8
    )


def test_text_ends_at_the_end_of_the_context(me: DeviceSession) -> None:
    room = 5
    prompt = "x" * (me.config.context_length - room)
    assert len(me.encode(prompt)) == me.config.context_length - room
    before = me.remote.count.payload_up
    me.generate(prompt, max_new_tokens=100)
    # every token but the last new one went through the service's layers, and `room` of them had an output
    cost = forward_traffic(me.service.info.model.shape, me.placement, me.settings.spec, 511, room, WireDtype.FLOAT32)
    assert me.config.context_length == 512
    assert me.remote.count.payload_up - before == cost.up


def test_two_streams_of_one_session_do_not_mix(me: DeviceSession) -> None:
    alone = {prompt: "".join(me.stream(prompt, max_new_tokens=20)) for prompt in ("one two", "seven eight")}
    streams = {prompt: me.stream(prompt, max_new_tokens=20) for prompt in alone}
    together = dict.fromkeys(alone, "")
    while streams:
        for prompt, stream in list(streams.items()):
            piece = next(stream, None)
            if piece is None:
                del streams[prompt]
            else:
                together[prompt] += piece
    assert together == alone


async def test_twins_at_the_same_time_do_not_mix(me: DeviceSession) -> None:
    prompts = ("one two", "seven eight", "ten")
    alone = [me.generate(prompt, max_new_tokens=20) for prompt in prompts]
    loss = me.evaluate(["some text"]).loss
    *together, found = await asyncio.gather(
        *(me.agenerate(prompt, max_new_tokens=20) for prompt in prompts), asyncio.to_thread(me.evaluate, ["some text"])
    )
    assert together == alone
    assert found.loss == loss


async def test_async_twins_give_the_same_text(me: DeviceSession) -> None:
    text = me.generate("one two", max_new_tokens=12)
    assert await me.agenerate("one two", max_new_tokens=12) == text
    assert "".join([piece async for piece in me.astream("one two", max_new_tokens=12)]) == text
