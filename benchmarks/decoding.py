"""Many sessions on one service, decoding: tokens/s against transformers' decoder at the same batch, and evenness.

    decode_32, decode_32_inline4    32 devices against transformers' decoder at batch 32, with its cache, no LM head
    decode_32_one_trip              32 devices that hold the first and last two layers, against its middle layers
    scale_32_over_1                 32 devices against one
    overhead_share_32               what of a step is not the fused step of 32 rows
    fairness_32, p99_over_p50_32    how evenly 32 devices are served
    decode_32_rtt20                 32 devices at 20 ms round trip, against what that and the service allow
    decode_32_whole                 32 complete `DeviceSession`s on the same cores, printed only

The devices are `loadgen.py`'s and have two cores with the service, as transformers alone has. All decode after prompts
of about 100 tokens, `WARMUP_TOKENS` that do not count and then `TOKENS`. Whoever takes part in a row runs in turn,
`ROUNDS` times over; medians are compared. `decode_1` is `speed.py`'s.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from benchmarks.fleet import WARMUP_TOKENS, WHOLE, Decoded, running
from benchmarks.inprocess import Sequences
from benchmarks.loadgen import FEW_INLINE
from benchmarks.rows import Row, Target, unmeasured
from benchmarks.speed import ATTENTIONS, attention_of
from benchmarks.workbench import Workbench
from privatelora.cloud.backbone import Backbone
from privatelora.device.service import Service
from privatelora.platform.models import BUNDLED, source_of
from privatelora.protocol.adapter import AdapterSpec
from privatelora.protocol.messages import ModelInfo
from privatelora.protocol.placement import ONE_TRIP_ENDS, Placement

DTYPE = "bfloat16"
SESSIONS = 32
PROMPT, TOKENS = 100, 45  # with the warm-up a context of 100 to 150 tokens
ROUNDS = 5
WHOLE_PROCESSES = 4
RTT_MS = 20.0
FAR_TOKENS = 15  # of each device, which take as long as 100 near by
COPY_BYTES, COPIES = 256 << 20, 5

PAPER, INLINE4, ONE_TRIP, ONE, FUSED = "32 devices", "inline 4", "one trip", "one device", "fused step"
FAR = "32 devices at 20 ms"
WHOLE_ROW = "decode_32_whole"
CENTRE = "middle layers, "  # and an attention: transformers without the ends that a one-trip device holds

TARGETS = {
    "decode_32": Target("tokens/s", floor=0.65, aim=1.1),
    "decode_32_inline4": Target("tokens/s", floor=0.85, aim=1.3),
    "decode_32_one_trip": Target("tokens/s", floor=0.9, aim=1.3),
    "scale_32_over_1": Target("tokens/s", floor=8, aim=13),
    "decode_32_rtt20": Target("tokens/s", floor=0.7, aim=0.9),
    "overhead_share_32": Target("share", "value", "lower", floor=0.45, aim=0.25),
    "fairness_32": Target("x", "value", "lower", floor=1.5, aim=1.1),
    "p99_over_p50_32": Target("x", "value", "lower", floor=4, aim=2),
    WHOLE_ROW: Target("tokens/s"),
}
CENTRES = tuple(CENTRE + attention for attention in ATTENTIONS)
NEEDS = {
    "decode_32": (*ATTENTIONS, PAPER),
    "decode_32_inline4": (*ATTENTIONS, INLINE4),
    "decode_32_one_trip": (*CENTRES, ONE_TRIP),
    "scale_32_over_1": (ONE, PAPER),
    "decode_32_rtt20": (FUSED, PAPER, FAR),
    "overhead_share_32": (FUSED, PAPER),
    "fairness_32": (PAPER,),
    "p99_over_p50_32": (PAPER,),
}
"""Who takes part in a row."""
FLEETS = {
    PAPER: (SESSIONS, "paper"),
    INLINE4: (SESSIONS, FEW_INLINE),
    ONE_TRIP: (SESSIONS, "one-trip"),
    ONE: (1, "paper"),
    FAR: (SESSIONS, "paper"),
}


def measure(names: Sequence[str], bench: Workbench, rounds: int = ROUNDS) -> Iterator[Row]:
    """Measure the rows called `names`, all in the same rounds."""
    wanted = [name for name in names if name in NEEDS]
    contest = Contest(bench)
    if wanted:
        contest.run({contender: None for name in wanted for contender in NEEDS[name]}, rounds)
    for name in wanted:
        try:
            yield _row(name, contest)
        except Exception as error:  # noqa: BLE001 (whatever it was: this row is named, and the others measured)
            yield unmeasured(name, TARGETS[name], error)
    if WHOLE_ROW in names:
        try:
            yield _whole(bench)
        except Exception as error:  # noqa: BLE001 (as above)
            yield unmeasured(WHOLE_ROW, TARGETS[WHOLE_ROW], error)


class Contest:
    """What each contender did in each round."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self._decoded: dict[str, list[Decoded]] = {}
        self._seconds: dict[str, list[float]] = {}  # of a step of 32 rows
        self._failed: dict[str, Exception] = {}
        self._fused: Callable[[], float] | None = None

    def run(self, contenders: dict[str, None], rounds: int) -> None:
        """All contenders in turn, again and again; one that failed is left out from then on."""
        self.rounds = rounds
        self.bench.address(DTYPE)
        self.copies_bytes_per_s = copy_bandwidth()
        for round_ in range(rounds):
            for contender in contenders:
                if contender in self._failed:
                    continue
                self.bench.say(f"decoding, round {round_ + 1} of {rounds}: {contender}")
                try:
                    self._run(contender, round_)
                except Exception as error:  # noqa: BLE001 (it is told in the rows that need this contender)
                    self._failed[contender] = error

    def decoded(self, contender: str) -> list[Decoded]:
        """A fleet's rounds; raises what went wrong in one."""
        if contender in self._failed:
            raise self._failed[contender]
        return self._decoded[contender]

    def rate(self, contender: str) -> float:
        """Median tokens/s of a fleet."""
        return statistics.median(decoded.tokens_per_s for decoded in self.decoded(contender))

    def step_s(self, contender: str) -> float:
        """Median seconds of a step in this process."""
        if contender in self._failed:
            raise self._failed[contender]
        return statistics.median(self._seconds[contender])

    @property
    def layers(self) -> int:
        """Of the model."""
        return self._model.shape.layers

    @property
    def layer_bytes(self) -> int:
        """Bytes of the service's layers at the paper's placement: what a pass over them reads at least."""
        return sum(blob.nbytes for name, blob in self._model.parts.items() if name.startswith("layer."))

    @cached_property
    def _model(self) -> ModelInfo:
        address = self.bench.address(DTYPE)
        service = Service(address.url, address.token, cache_dir=self.bench.cache_dir)
        service.close()
        return service.info.model

    @property
    def floor_s(self) -> float:
        """The machine's own floor of a pass: its weights over its copy bandwidth."""
        return self.layer_bytes / self.copies_bytes_per_s

    def _run(self, contender: str, round_: int) -> None:
        if contender in FLEETS:
            devices, placement = FLEETS[contender]
            address, tokens = self.bench.address(DTYPE), TOKENS
            if contender == FAR:
                address, tokens = self.bench.far_address(DTYPE, RTT_MS), FAR_TOKENS
            with running(address, devices, placement, tokens, cache_dir=self.bench.cache_dir, seed=round_) as fleet:
                self._decoded.setdefault(contender, []).append(fleet.decode())
            return
        if contender == FUSED:
            seconds = fused_step_seconds(self._backbone)
        elif contender in CENTRES:
            seconds = transformers_step_seconds(self._centre, contender.removeprefix(CENTRE))
        else:
            seconds = transformers_step_seconds(self.bench.transformers_model(DTYPE).model, contender)
        self._seconds.setdefault(contender, []).append(seconds)

    @cached_property
    def _centre(self) -> PreTrainedModel:
        return middle_layers(self.bench.transformers_model(DTYPE).model)

    @cached_property
    def _backbone(self) -> Backbone:
        return Backbone.load(
            source_of(BUNDLED), self.bench.data_dir, getattr(torch, DTYPE)
        )  # what the service published


def transformers_step_seconds(model: PreTrainedModel, attention: str) -> float:
    """Seconds in which transformers decodes one token for each of 32 sequences, embeddings in and h out."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (SESSIONS, PROMPT + WARMUP_TOKENS + TOKENS), generator=generator)
    with attention_of(model, attention), torch.inference_mode():
        h = model.get_input_embeddings()(tokens)  # (32, n, d)
        cache = DynamicCache(config=model.config)
        model(inputs_embeds=h[:, :PROMPT], past_key_values=cache, use_cache=True)
        return _seconds_a_step(
            lambda i: model(inputs_embeds=h[:, PROMPT + i : PROMPT + i + 1], past_key_values=cache, use_cache=True)
        )


def middle_layers(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' decoder without a one-trip device's layers and the final norm; the same weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers -= 2 * ONE_TRIP_ENDS
    middle: PreTrainedModel = type(model)(config)
    whole = model.state_dict()
    state = {name: tensor for name, tensor in whole.items() if not name.startswith("layers.")}
    for l in range(config.num_hidden_layers):
        here, there = f"layers.{l}.", f"layers.{l + ONE_TRIP_ENDS}."
        state |= {here + name.removeprefix(there): tensor for name, tensor in whole.items() if name.startswith(there)}
    middle.load_state_dict(state, assign=True)
    middle.norm = nn.Identity()
    middle.requires_grad_(False).train(False)
    return middle


def fused_step_seconds(backbone: Backbone) -> float:
    """Seconds of the service's own step over 32 sequences of one new token each, every layer inline, without sockets.

    v is at hand at once, as M is the devices' work.
    """
    placement, spec = Placement.named("paper", backbone.config.num_layers), AdapterSpec()
    set_hash = backbone.default_sets[spec.kind]
    tokens = PROMPT + WARMUP_TOKENS + TOKENS
    sequences = Sequences(backbone, placement, set_hash, spec, SESSIONS, tokens)
    generator = torch.Generator().manual_seed(0)

    def step(length: int) -> Tensor:
        h = torch.randn(SESSIONS * length, backbone.config.hidden_size, generator=generator)
        return sequences.step(h.to(backbone.dtype))

    step(PROMPT)
    return _seconds_a_step(lambda i: step(1))


def copy_bandwidth() -> float:
    """Bytes/s that a large copy reads and writes together, the best of a few."""
    source, target = torch.zeros(COPY_BYTES, dtype=torch.uint8), torch.ones(COPY_BYTES, dtype=torch.uint8)
    seconds = []
    for _ in range(COPIES):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * COPY_BYTES / min(seconds)


def _seconds_a_step(step: Callable[[int], object]) -> float:
    """Mean seconds of steps `WARMUP_TOKENS` and on, as a device's rate is one over all its tokens."""
    for i in range(WARMUP_TOKENS):
        step(i)
    started = time.perf_counter()
    for i in range(WARMUP_TOKENS, WARMUP_TOKENS + TOKENS):
        step(i)
    return (time.perf_counter() - started) / TOKENS


@dataclass(frozen=True)
class Against:
    """A fleet's row against transformers: the fleet, its contenders, and what they are."""

    fleet: str
    contenders: Sequence[str]
    what: str


AGAINST = {
    "decode_32": Against(PAPER, ATTENTIONS, "every layer inline"),
    "decode_32_inline4": Against(INLINE4, ATTENTIONS, "four inline layers"),
    "decode_32_one_trip": Against(ONE_TRIP, CENTRES, "nothing inline, two layers at each end on the device"),
}


def _row(name: str, contest: Contest) -> Row:
    if name in AGAINST:
        return _against_transformers(name, AGAINST[name], contest)
    of = contest.decoded(PAPER)
    where = f"{SESSIONS} devices, every layer inline, {DTYPE}; medians of {contest.rounds} rounds"
    if name == "scale_32_over_1":
        many, one = contest.rate(PAPER), contest.rate(ONE)
        return Row(name, TARGETS[name], many, one, many / one, f"against one device in the same rounds; {where}")
    if name == "decode_32_rtt20":
        return _far(contest, where)
    if name == "overhead_share_32":
        step, fused = statistics.median(decoded.step_s for decoded in of), contest.step_s(FUSED)
        conditions = (
            f"step of {1e3 * step:.1f} ms, {1e3 * fused:.1f} ms fused in this process on {contest.bench.threads} "
            f"threads, without sockets; {where}"
        )
        return Row(name, TARGETS[name], 1 - fused / step, conditions=conditions)
    if name == "fairness_32":
        conditions = f"rate of the median device over the slowest one's; {where}"
        return Row(name, TARGETS[name], statistics.median(decoded.fairness for decoded in of), conditions=conditions)
    p50, p99 = (statistics.median(decoded.percentile_s(percent) for decoded in of) for percent in (50, 99))
    return Row(
        name,
        TARGETS[name],
        statistics.median(decoded.percentile_s(99) / decoded.percentile_s(50) for decoded in of),
        conditions=f"a token's time, p50 {1e3 * p50:.1f} ms and p99 {1e3 * p99:.1f} ms; {where}",
        extra={"p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99},
    )


def _against_transformers(name: str, row: Against, contest: Contest) -> Row:
    rate = contest.rate(row.fleet)
    others = {contender: SESSIONS / contest.step_s(contender) for contender in row.contenders}
    best = max(others, key=others.__getitem__)
    layers = contest.floor_s * (26 / 30 if row.fleet == ONE_TRIP else 1)
    decoded = contest.decoded(row.fleet)
    told = ", ".join(f"{contender} {other:.1f}" for contender, other in others.items())
    return Row(
        name,
        TARGETS[name],
        rate,
        others[best],
        rate / others[best],
        f"{SESSIONS} devices, {row.what}, {DTYPE}, r=64 linear M, prompts of 90 to 110 tokens, {TOKENS} decoded after "
        f"{WARMUP_TOKENS} of warm-up; transformers {told} tokens/s at batch {SESSIONS}; medians of {contest.rounds} "
        f"rounds in turn; pass of {1e3 * SESSIONS / rate:.1f} ms, where {1e3 * layers:.1f} ms is the machine's floor "
        f"(weights over {contest.copies_bytes_per_s / 1e9:.1f} GB/s of copies); the devices took "
        f"{statistics.median(d.cpu_us_per_exchange for d in decoded):.0f} us of CPU an exchange, "
        f"{statistics.median(d.compiled_exchanges / d.exchanges for d in decoded):.0%} of them in compiled code",
        {"floor_ms": 1e3 * layers},
    )


def _far(contest: Contest, where: str) -> Row:
    """What 32 devices can have at that round trip at most: a trip for each inline layer, one for h, and a pass."""
    trips = len(Placement.named("paper", contest.layers).inline) + 1
    rate, near, fused = contest.rate(FAR), contest.rate(PAPER), contest.step_s(FUSED)
    bound = SESSIONS / (trips * RTT_MS / 1e3 + fused)
    measured = contest.bench.far_address(DTYPE, RTT_MS).rtt_ms
    conditions = (
        f"{RTT_MS:g} ms round trip by a delaying TCP proxy (measured {measured:.1f} ms more than loopback), against "
        f"the lower of loopback's {near:.1f} tokens/s and {bound:.1f}, {SESSIONS} a time of {trips} round trips and "
        f"one pass of {1e3 * fused:.1f} ms; {where}"
    )
    baseline = min(near, bound)
    return Row("decode_32_rtt20", TARGETS["decode_32_rtt20"], rate, baseline, rate / baseline, conditions)


def _whole(bench: Workbench) -> Row:
    """32 complete devices beside the service on its cores: one run, since their start takes longest."""
    bench.say(f"{WHOLE_ROW}: starting {SESSIONS} complete devices")
    with running(
        bench.address(DTYPE), SESSIONS, "paper", TOKENS, processes=WHOLE_PROCESSES, program=WHOLE,
        cache_dir=bench.cache_dir,
    ) as fleet:  # fmt: skip
        decoded = fleet.decode()
    return Row(
        WHOLE_ROW,
        TARGETS[WHOLE_ROW],
        decoded.tokens_per_s,
        conditions=f"{SESSIONS} DeviceSessions in {WHOLE_PROCESSES} processes, embedding, M and LM head of each on the "
        f"service's own cores, every layer inline, {DTYPE}; p50 {1e3 * decoded.percentile_s(50):.0f} ms and p99 "
        f"{1e3 * decoded.percentile_s(99):.0f} ms a token, fairness {decoded.fairness:.2f}; one run",
    )
