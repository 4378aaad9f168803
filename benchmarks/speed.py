"""How fast one session is, against transformers on this machine in the same dtype and the same run.

    decode_1, generate_*   tokens/s of `DeviceSession.generate` over those of `model.generate`, 50 after a prompt of 100
    train_*      tokens/s of `forward_backward` over those of transformers with the same adapter by hooks, 4 x 128
    wire_ms_per_exchange    what sockets, frames, threads and the second process add to one exchange

Ours is a whole session: the device in this process and the service in another, both on this machine's cores. The
contenders of a row run in turn, again and again, so that a machine that slows down slows all; medians are compared.
Transformers' side is the faster of its `sdpa` and `eager`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.inprocess import Sequences
from benchmarks.reference import inline_adapter, loss_of
from benchmarks.rows import Row, Target, Unmeasured, unmeasured
from benchmarks.workbench import Workbench
from privatelora.cloud.backbone import Backbone
from privatelora.device import DeviceSession
from privatelora.device.data import IGNORE, Example
from privatelora.device.stream import Span
from privatelora.platform.models import BUNDLED, source_of
from privatelora.protocol.frames import Phase
from privatelora.protocol.messages import Blob

PROMPT, NEW = 100, 50  # tokens: a context of 100 to 150
SEQUENCES, LENGTH = 4, 128
REPEATS = 5
ATTENTIONS = ("sdpa", "eager")
WIRE = "wire_ms_per_exchange"
LOOPBACK, IN_PROCESS, ONE_THREAD = "loopback", "in process", "in process, one thread"
M_SCALE = 0.02  # of the random M in training: at zero half of the gradients would vanish


@dataclass(frozen=True)
class Ratio:
    """One row against transformers."""

    verb: str  # generate or train
    placement: str
    dtype: str
    target: Target


def _ratios() -> dict[str, Ratio]:
    bounds = {"generate": (0.6, 0.9), "train": (0.7, 1.0)}
    made = {}
    for dtype, suffix in (("bfloat16", ""), ("float32", "_float32")):
        for verb, (floor, aim) in bounds.items():
            judged = Target("tokens/s", floor=floor, aim=aim)
            if (verb, dtype) != ("generate", "bfloat16"):  # which is `decode_1`
                made[f"{verb}_vs_transformers{suffix}"] = Ratio(verb, "paper", dtype, judged)
            made[f"{verb}_one_trip_vs_transformers{suffix}"] = Ratio(verb, "one-trip", dtype, Target("tokens/s"))
    made["decode_1"] = Ratio("generate", "paper", "bfloat16", Target("tokens/s", floor=0.75, aim=1.1))
    return made


RATIOS = _ratios()
TARGETS = {name: row.target for name, row in RATIOS.items()} | {WIRE: Target("ms", "value", "lower", floor=0.5)}


def measure(names: Sequence[str], bench: Workbench, repeats: int = REPEATS) -> Iterator[Row]:
    """Measure the rows called `names`; those of one dtype and verb run side by side."""
    for dtype in ("bfloat16", "float32"):
        for verb, contest in (("generate", _generate), ("train", _train)):
            group = [
                name for name in names if name in RATIOS and (RATIOS[name].verb, RATIOS[name].dtype) == (verb, dtype)
            ]
            if not group:
                continue
            try:
                bench.say(f"{verb}, {dtype}: {repeats} rounds")
                yield from contest(group, dtype, bench, repeats)
            except Exception as error:  # noqa: BLE001 (whatever it was: these rows are named, and the others measured)
                yield from (unmeasured(name, TARGETS[name], error) for name in group)
    if WIRE in names:
        try:
            bench.say(f"{WIRE}: {repeats} rounds")
            yield _wire(bench, repeats)
        except Exception as error:  # noqa: BLE001 (as above)
            yield unmeasured(WIRE, TARGETS[WIRE], error)


def _generate(names: Sequence[str], dtype: str, bench: Workbench, repeats: int) -> Iterator[Row]:
    model = bench.transformers_model(dtype)
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(bench.session(dtype, placement=RATIOS[name].placement)) for name in names}
        tokenizer = next(iter(sessions.values())).tokenizer
        prompt, ids = _prompt(tokenizer)
        texts: dict[str, str] = {}

        def ours(name: str) -> None:
            forwarded = _forwarded_tokens(sessions[name])
            texts[name] = sessions[name].generate(prompt, max_new_tokens=NEW)
            made = _forwarded_tokens(sessions[name]) - forwarded - PROMPT + 1  # the last new token is not sent
            if made != NEW:
                raise Unmeasured(f"{name} generated {made} tokens instead of {NEW}; the model ended its answer")

        def theirs(attention: str) -> None:
            with attention_of(model, attention), torch.inference_mode():
                out = model.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
                    do_sample=False,
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    pad_token_id=0,
                )
            texts[attention] = tokenizer.decode(out[0, PROMPT:], skip_special_tokens=True)

        seconds = _in_turn(dict.fromkeys(names, ours) | dict.fromkeys(ATTENTIONS, theirs), repeats)
        for name in names:
            same = "the same" if texts[name] in (texts["sdpa"], texts["eager"]) else "another"
            what = f"prompt of {PROMPT} tokens, {NEW} new, greedy, {same} text"
            yield _against_transformers(name, seconds, NEW, what, bench, repeats)


def _train(names: Sequence[str], dtype: str, bench: Workbench, repeats: int) -> Iterator[Row]:
    model = bench.transformers_model(dtype)
    with ExitStack() as stack:
        adapted = stack.enter_context(bench.session(dtype, placement="paper"))
        sessions = {
            name: adapted
            if RATIOS[name].placement == "paper"
            else stack.enter_context(bench.session(dtype, placement=RATIOS[name].placement))
            for name in names
        }
        examples = _examples(adapted.tokenizer)
        _randomise(adapted)
        a, b = _published(adapted, getattr(torch, dtype))
        m = {l: adapted.adapter.m[str(l)].weight.detach()[0].clone().requires_grad_() for l in adapted.placement.inline}
        losses: dict[str, float] = {}

        def ours(name: str) -> None:
            losses[name] = sessions[name].forward_backward(examples).loss
            sessions[name].optimizer.zero_grad()

        def theirs(attention: str) -> None:
            with attention_of(model, attention), inline_adapter(model, a, b, m):
                loss = loss_of(model, examples)
                loss.backward()
            losses[attention] = float(loss.detach())
            for weight in m.values():
                weight.grad = None

        seconds = _in_turn(dict.fromkeys(names, ours) | dict.fromkeys(ATTENTIONS, theirs), repeats)
        tokens = SEQUENCES * LENGTH
        for name in names:
            what = f"forward and backward, {SEQUENCES} sequences of {LENGTH} tokens"
            if RATIOS[name].placement == "paper":
                what += f", same r=64 linear M in both; loss {losses[name]:.4f}, transformers {losses['sdpa']:.4f}"
            else:
                what += ", LoRA r=16 on the device's layers, against transformers with the paper's placement's adapter"
            yield _against_transformers(name, seconds, tokens, what, bench, repeats)


def _against_transformers(
    name: str, seconds: dict[str, list[float]], tokens: int, what: str, bench: Workbench, repeats: int
) -> Row:
    """A row from everybody's times, medians."""
    rate = {contender: tokens / statistics.median(times) for contender, times in seconds.items()}
    best = max(ATTENTIONS, key=rate.__getitem__)
    others = ", ".join(f"{attention} {rate[attention]:.1f}" for attention in ATTENTIONS)
    row = RATIOS[name]
    return Row(
        name,
        row.target,
        value=rate[name],
        baseline=rate[best],
        ratio=rate[name] / rate[best],
        conditions=f"{row.placement}, {row.dtype}, {what}; transformers {others} tokens/s; medians of {repeats} runs "
        f"in turn, {bench.threads} threads a process, device and service in two",
    )


def _wire(bench: Workbench, repeats: int) -> Row:
    """Time of a decoding step over loopback, less the same step in this process, over its round trips.

    Both run one token through the service's 30 layers with 30 exchanges of u and v (and h up and down), at a context of
    100 to 150 tokens, M on the device's side and the codec on both included, embedding and LM head not. In this process
    the step has all of torch's threads; the service gives a single token one, so the step with one is told as well.
    """
    with bench.session("bfloat16", placement="paper") as me:
        source = source_of(BUNDLED)
        backbone = Backbone.load(source, bench.data_dir, torch.bfloat16)  # what the service published, read again
        _, ids = _prompt(me.tokenizer)
        h = me.model.embedding[torch.tensor(ids)]  # (PROMPT, d)
        steps: dict[str, list[float]] = {LOOPBACK: [], IN_PROCESS: [], ONE_THREAD: []}

        def run(where: str) -> None:
            step = _remote_step(me) if where == LOOPBACK else _local_step(me, backbone)
            torch.set_num_threads(1 if where == ONE_THREAD else bench.threads)
            try:
                step(h)  # prefill
                for _ in range(NEW):
                    started = time.perf_counter()
                    step(h[-1:])
                    steps[where].append(time.perf_counter() - started)
            finally:
                torch.set_num_threads(bench.threads)

        with torch.inference_mode():
            _in_turn(dict.fromkeys(steps, run), repeats)
        trips = me.placement.round_trips
    # the first NEW steps of each are the round that warms up
    ms = {where: 1e3 * statistics.median(times[NEW:]) for where, times in steps.items()}
    return Row(
        WIRE,
        TARGETS[WIRE],
        value=(ms[LOOPBACK] - ms[IN_PROCESS]) / trips,
        conditions=f"paper, bfloat16, one session over loopback: median decoding step of {ms[LOOPBACK]:.2f} ms, less "
        f"{ms[IN_PROCESS]:.2f} ms for the same layers and M in one process with {bench.threads} threads "
        f"({ms[ONE_THREAD]:.2f} ms with one), over {trips} round trips; context {PROMPT} to {PROMPT + NEW} tokens, "
        f"{repeats} rounds of {NEW} steps in turn",
    )


Step = Callable[[Tensor], Tensor]
"""h_first (n, d) of the next n tokens of one sequence to h_L of the last, (1, d)"""


def _remote_step(me: DeviceSession) -> Step:
    sequence, start = me.remote.new_sequence(), 0

    def step(h: Tensor) -> Tensor:
        nonlocal start
        span = Span(sequence, start, h.shape[0])
        start += h.shape[0]
        return me.remote.forward(h, [span], Phase.GENERATE, me.adapter, torch.tensor([h.shape[0] - 1]))

    return step


def _local_step(me: DeviceSession, backbone: Backbone) -> Step:
    """The service's own passes and the device's own M, with nothing between."""
    assert me.identity.set_hash is not None
    m, spec = me.adapter.delta, me.settings.spec
    return Sequences(backbone, me.placement, me.identity.set_hash, spec, tokens=PROMPT + NEW, delta=m).step


def _in_turn(contenders: dict[str, Callable[[str], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender's runs: all of them once to warm up, then all of them `repeats` times over."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(repeats + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run(name)
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@contextmanager
def attention_of(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Let transformers compute attention in this way."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _prompt(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """A text of exactly `PROMPT` tokens that the model goes on with for a while, and its tokens."""
    text = public_text()
    ids = list(tokenizer(text[: 16 * PROMPT])["input_ids"])[:PROMPT]
    prompt = tokenizer.decode(ids)
    if list(tokenizer(prompt)["input_ids"]) != ids:
        raise Unmeasured(f"no text of exactly {PROMPT} tokens was found with this tokenizer")
    return prompt, ids


def _examples(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """`SEQUENCES` windows of public text, every token but the first a label."""
    ids = torch.tensor(tokenizer(public_text()[: 16 * SEQUENCES * LENGTH])["input_ids"][: SEQUENCES * LENGTH])
    windows = ids.view(SEQUENCES, LENGTH)
    labels = torch.cat((windows[:, 1:], torch.full((SEQUENCES, 1), IGNORE)), dim=1)
    return [Example(window.numpy(), label.numpy()) for window, label in zip(windows, labels, strict=True)]


def public_text() -> str:
    """The standard library's own documentation of the language, past what the adapter sets are calibrated on."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics, reverse=True))


def _randomise(me: DeviceSession) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in me.adapter.parameters():
            parameter.normal_(std=M_SCALE, generator=generator)


def _published(me: DeviceSession, dtype: torch.dtype) -> tuple[dict[int, Tensor], dict[int, dict[str, Tensor]]]:
    """A (r, d) and B (r, d_p) of each inline layer as the service publishes them, at the session's ranks."""
    spec = me.settings.spec
    found = next(found for found in me.service.info.sets if found.sha256 == me.identity.set_hash)
    path: Path = me.service.download(Blob(sha256=found.sha256, nbytes=found.nbytes))
    with safe_open(path, framework="pt") as file:
        a = {l: file.get_tensor(f"layer.{l}.a")[0, : spec.rank_down].to(dtype) for l in me.placement.inline}
        b = {
            l: {name: file.get_tensor(f"layer.{l}.b.{name}")[: spec.rank_up].to(dtype) for name in ("q", "k", "v")}
            for l in me.placement.inline
        }
    return a, b


def _forwarded_tokens(me: DeviceSession) -> int:
    """Tokens that this session has sent through the service, from its count of bytes."""
    shape, size = me.service.info.model.shape, me.remote.wire_dtype.nbytes
    a_token = size((1, shape.hidden)) + len(me.placement.inline) * size(me.settings.spec.delta_shape(1))
    return me.remote.expected.up // a_token
