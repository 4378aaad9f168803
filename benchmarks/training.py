"""Training on one service: many devices at once, over a long round trip, and beside others who chat.

    train_8_devices        8 devices at once, against the same 8 one after another
    train_rtt20            one device at 20 ms round trip, in pipelined micro-batches, against loopback
    chat_while_training    a token's time of one who chats while 8 devices train, against the same chat alone
    train_while_chatting   4 devices while 8 sessions chat at 4 tokens/s each, against the same 4 alone

Devices are complete `DeviceSession`s, a process each (`workers.py`), on the service's own cores; those 8 who only chat
are `loadgen.py`'s. A step is forward, backward and AdamW. What is compared runs in turn, `ROUNDS` times over; medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property

from benchmarks.fleet import Decoded, running
from benchmarks.rows import Row, Target, unmeasured
from benchmarks.workbench import Workbench
from benchmarks.worker import LENGTH
from benchmarks.workers import SEQUENCES, Worker, at_once, hired, rate

DTYPE = "bfloat16"
ROUNDS = 5
DEVICES, FEWER = 8, 4  # that train
STEPS = 2  # of each device, in turn and at once
RTT_MS, FAR_SEQUENCES = 20.0, 16
CHAT_TOKENS = 30
CHATS, CHAT_RATE = 8, 4.0  # sessions, and tokens/s of each
CHAT_LIMIT = 4000  # tokens of each: they are stopped long before

TARGETS = {
    "train_8_devices": Target("tokens/s", floor=1.1, aim=1.5),
    "train_rtt20": Target("tokens/s", floor=0.7, aim=0.9),
    "chat_while_training": Target("ms", better="lower", floor=4, aim=2),
    "train_while_chatting": Target("tokens/s", floor=0.5, aim=0.76),
}


def measure(names: Sequence[str], bench: Workbench, rounds: int = ROUNDS) -> Iterator[Row]:
    """Measure the rows called `names`, one after another, with the same devices."""
    with ExitStack() as stack:
        party = Party(bench, stack, rounds)
        rows: dict[str, Callable[[], Row]] = {
            "train_8_devices": party.together,
            "train_rtt20": party.far,
            "chat_while_training": party.chat_beside,
            "train_while_chatting": party.beside_chats,
        }
        for name in names:
            try:
                yield rows[name]()
            except Exception as error:  # noqa: BLE001 (whatever it was: this row is named, and the others measured)
                yield unmeasured(name, TARGETS[name], error)


class Party:
    """The devices, hired when a row first needs them."""

    def __init__(self, bench: Workbench, stack: ExitStack, rounds: int) -> None:
        self.bench, self.rounds, self._stack = bench, rounds, stack

    @cached_property
    def trainers(self) -> list[Worker]:
        self.bench.say(f"starting {DEVICES} complete devices")
        workers = self._hire(DEVICES)
        at_once(workers, 1)  # warms up
        return workers

    def together(self) -> Row:
        """8 devices at once, and one after another: the same steps."""
        together, alone = [], []
        trainers = self.trainers
        for _ in self._rounds("train_8_devices"):
            seconds = tokens = 0.0
            for worker in trainers:
                worker.train(STEPS)
                work = worker.wait()
                seconds, tokens = seconds + work.seconds, tokens + work.tokens
            alone.append(tokens / seconds)
            together.append(at_once(trainers, STEPS))
        return self._ratio(
            "train_8_devices", together, alone, f"{DEVICES} devices at once, against one after another, {STEPS} steps "
            f"of {SEQUENCES} sequences of {LENGTH} tokens each",
        )  # fmt: skip

    def far(self) -> Row:
        """One device near and one far, a step each in turn."""
        far_address = self.bench.far_address(DTYPE, RTT_MS)
        near = self._hire(1)[0]
        (far,) = self._stack.enter_context(hired(far_address, 1, cache_dir=self.bench.cache_dir))

        def step(worker: Worker) -> float:
            worker.train(1, FAR_SEQUENCES)
            return rate([worker.wait()])

        step(near), step(far)  # warms up
        rates = [(step(far), step(near)) for _ in self._rounds("train_rtt20")]
        return self._ratio(
            "train_rtt20", [far for far, _ in rates], [near for _, near in rates],
            f"one device, steps of {FAR_SEQUENCES} sequences of {LENGTH} tokens in micro-batches of about 512 tokens, "
            f"{RTT_MS:g} ms round trip by a delaying TCP proxy (measured {far_address.rtt_ms:.1f} ms more than "
            "loopback), against loopback",
        )  # fmt: skip

    def chat_beside(self) -> Row:
        """One who chats, alone and while 8 train."""
        (chatter,) = self._hire(1)
        alone, beside, training = [], [], []

        def chat() -> float:
            chatter.chat(CHAT_TOKENS)
            work = chatter.wait()
            return 1e3 * work.seconds / len(work.times)

        chat()  # warms up
        trainers = self.trainers
        for _ in self._rounds("chat_while_training"):
            alone.append(chat())
            for worker in trainers:
                worker.train()
            beside.append(chat())
            for worker in trainers:
                worker.enough()
            training.append(rate([worker.wait() for worker in trainers]))
        return self._ratio(
            "chat_while_training", beside, alone, f"mean time of a token, {CHAT_TOKENS} tokens, of one DeviceSession "
            f"while {DEVICES} train ({statistics.median(training):.0f} tokens/s), against the same alone",
        )  # fmt: skip

    def beside_chats(self) -> Row:
        """4 who train, alone and while 8 chat."""
        trainers = self.trainers[:FEWER]
        alone, beside, chats = [], [], list[Decoded]()
        for round_ in self._rounds("train_while_chatting"):
            alone.append(at_once(trainers, STEPS))
            with running(
                self.bench.address(DTYPE), CHATS, "paper", CHAT_LIMIT, tokens_per_second=CHAT_RATE,
                cache_dir=self.bench.cache_dir, seed=round_,
            ) as fleet:  # fmt: skip
                fleet.begin()
                beside.append(at_once(trainers, STEPS))
                chats.append(fleet.end())
        chatted = statistics.median(decoded.tokens_per_s for decoded in chats)
        p50 = statistics.median(decoded.percentile_s(50) for decoded in chats)
        return self._ratio(
            "train_while_chatting", beside, alone, f"{FEWER} devices train while {CHATS} sessions chat at up to "
            f"{CHAT_RATE:g} tokens/s each (they had {chatted:.1f} together, p50 {1e3 * p50:.0f} ms a token), against "
            "the same devices alone",
        )  # fmt: skip

    def _hire(self, count: int) -> list[Worker]:
        return self._stack.enter_context(hired(self.bench.address(DTYPE), count, cache_dir=self.bench.cache_dir))

    def _rounds(self, name: str) -> Iterator[int]:
        """Numbers of the rounds, told as they begin."""
        for round_ in range(self.rounds):
            self.bench.say(f"{name}: round {round_ + 1} of {self.rounds}")
            yield round_

    def _ratio(self, name: str, ours: list[float], theirs: list[float], what: str) -> Row:
        value, baseline = statistics.median(ours), statistics.median(theirs)
        conditions = (
            f"{what}; complete DeviceSessions, a process each on the service's cores, paper placement, r=64 linear M, "
            f"{DTYPE}; medians of {self.rounds} rounds in turn"
        )
        return Row(name, TARGETS[name], value, baseline, value / baseline, conditions)
