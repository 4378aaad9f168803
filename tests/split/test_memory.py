"""Frozen weights are held once a process; a session holds its caches and activations, and nothing once it is gone."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack
from pathlib import Path

import torch
from tests.split.common import random_examples
from tests.support.fleet import DEPTH, SMOLLM2, Fleet
from tests.support.inside import serving, wait_for

from privatelora.cloud.backbone import Backbone
from privatelora.cloud.plane import DataPlane
from privatelora.cloud.session import Session
from privatelora.decoder.kv import BLOCK
from privatelora.device import DeviceSession
from privatelora.device.batch import Batch
from privatelora.device.exchange import RemoteLayers
from privatelora.device.stream import Span
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.frames import Phase

MB = 1 << 20
SESSIONS = 12
TOKENS = 100  # of each session's prompt
SMOLLM2_WEIGHTS = 30 * 4 * (960 * 576 + 576 * 576 + 3 * 576 * 1536)  # bytes of the service's layers, float32
SMOLLM2_KV = 30 * 2 * 192 * 4  # bytes a token


def test_weights_are_held_once_whatever_the_number_of_sessions(fleet: Fleet) -> None:
    """Twelve sessions of one service, each with a KV cache, cost their caches and not one copy of the weights."""
    running = fleet.service(SMOLLM2)
    with fleet.session(SMOLLM2, placement="paper") as me, ExitStack() as open_sessions:

        def open_another() -> None:
            remote = another_connection(me)
            open_sessions.callback(remote.disconnect)
            prefill(me, remote)

        open_another()
        with_one = running.memory_bytes()
        for part in ("RssAnon", "RssFile"):  # oneDNN's copy, and the published file's pages: each of them once
            small = fleet.service("llama").memory_bytes(part=part)
            assert running.memory_bytes(part=part) - small < 1.5 * SMOLLM2_WEIGHTS
        for _ in range(SESSIONS - 1):
            open_another()
        grown = running.memory_bytes() - with_one
    caches = (SESSIONS - 1) * 2 * TOKENS * SMOLLM2_KV  # a cache may have room for as many tokens again
    assert grown < caches + 32 * MB < SMOLLM2_WEIGHTS / 2


def test_memory_of_sessions_that_ended_is_used_again(fleet: Fleet) -> None:
    """Devices that come, leave a cache and a training pass half done, and go: the service does not grow with them.

    What malloc gives back to the system, and when, lets a service's resident memory rise and fall by up to 56 MB from
    one device to the next; the highest of several is steady within 5.
    """
    running = fleet.service(SMOLLM2)
    with fleet.session(SMOLLM2, placement="paper") as me:
        batch = Batch.of(random_examples((TOKENS,), me.config.vocab_size))

        def most_after(devices: int) -> int:
            """The most bytes that the service had after one of so many devices had come and gone."""
            return max(after_another() for _ in range(devices))

        def after_another() -> int:
            remote = another_connection(me)
            prefill(me, remote)
            h = me.model.enter(batch.tokens, me.model.ragged(batch.lengths), me.adapter)
            remote.forward(h, batch.spans(), Phase.TRAIN, me.adapter, batch.rows)
            remote.disconnect()
            return running.memory_bytes()

        settled = most_after(6)
        state = TOKENS * SMOLLM2_KV  # of one session's cache alone; its activations are several times that
        assert most_after(8) - settled < 4 * state


def test_a_session_holds_its_caches_and_activations_only_and_leaves_nothing(fleet: Fleet, tmp_path: Path) -> None:
    with (
        serving(Backbone.load(fleet.source("qwen3"), tmp_path, torch.float32)) as (plane, url),
        connect(url, tmp_path / "first", fleet) as first,
        connect(url, tmp_path / "second", fleet) as second,
    ):
        batch = Batch.of(random_examples((30, 7), first.config.vocab_size))
        for me in (first, second):
            me.split.forward_backward(batch, torch.nn.functional.cross_entropy)
            me.generate("A prompt", max_new_tokens=3)
        # RELEASE is not answered, so it may be a moment behind; then a finished step and a finished text leave nothing
        wait_for(lambda: all(not held.caches and not held.passes for held in plane.sessions.values()))
        assert_weights_are_shared(plane)

        first.split.decode(list(range(4, 24))).next_logits()
        h = first.model.enter(batch.tokens, first.model.ragged(batch.lengths), first.adapter)
        first.remote.forward(h, batch.spans(), Phase.TRAIN, first.adapter, batch.rows)
        held = state_of(plane.sessions[first.remote.session])
        first.remote.disconnect()
        wait_for(lambda: list(plane.sessions) == [second.remote.session])
        wait_for(lambda: gc.collect() >= 0 and all(reference() is None for reference in held))
        assert (plane.memory.used_bytes, plane.pool.used) == (0, 0)
        second.generate("A prompt", max_new_tokens=3)  # the other session goes on


def assert_weights_are_shared(plane: DataPlane) -> None:
    """Both sessions work on the very tensors that the backbone holds."""
    ours, theirs = plane.sessions.values()
    for l in range(DEPTH):
        assert ours.inline[l] is theirs.inline[l]
    assert ours.backbone is theirs.backbone is plane.backbone


def state_of(session: Session) -> list[weakref.ref[object]]:
    """Weak references to all that a session holds: one cache, and one pass with its activations."""
    (cache,), (active,) = session.caches.values(), session.passes.values()
    assert cache.nbytes == 2 * BLOCK * DEPTH * 2 * 64 * 4  # 20 tokens; k and v, 2 heads of 32
    work = active.work
    assert work.batch is not None
    kept = [saved for saved, _ in work.saved.values()]
    assert len(kept) == DEPTH
    tensors = [tensor for saved in kept for tensor in vars(saved).values()] + list(work.batch.tensors.values())
    assert session.held_bytes == cache.nbytes + active.held_bytes
    activations = sum(tensor.nbytes for saved in kept for tensor in vars(saved).values())
    assert activations <= active.held_bytes < 1.2 * activations  # counted as what it is
    return [weakref.ref(thing) for thing in (session, cache, work, work.batch, *kept, *tensors)]


def connect(url: str, store: Path, fleet: Fleet) -> DeviceSession:
    cache = fleet.folder / "cache"
    return DeviceSession(url, token="t", store_dir=store, cache_dir=cache, placement="paper", rank=(16, 8))


def another_connection(me: DeviceSession) -> RemoteLayers:
    """One more session of the same device's service, without a second copy of the device's own weights."""
    return RemoteLayers(me.service, me.placement, me.settings, me.identity.set_hash, WireDtype.FLOAT32, torch.float32)


def prefill(me: DeviceSession, remote: RemoteLayers) -> None:
    """Run a prompt through a session and leave its cache there."""
    with torch.inference_mode():
        h = me.model.enter(torch.arange(TOKENS), me.model.ragged([TOKENS]), me.adapter)
        remote.forward(h, [Span(1, 0, TOKENS)], Phase.GENERATE, me.adapter, torch.tensor([TOKENS - 1]))
