"""One complete device in a process of its own, which does what it is told, again and again; `workers.py` starts it.

    python -m benchmarks.worker --url URL --token TOKEN --cache-dir DIR

Each line on stdin is an errand, and each is answered by a line on stdout:

    {"do": "train", "steps": 2, "sequences": 4}      forward, backward and AdamW, on sequences of `LENGTH` tokens
    {"do": "chat", "tokens": 30}                      tokens one by one, after a prompt of `PROMPT`
    {"done": [[begun, done], ...], "tokens": n}       what either is answered with, in seconds of the machine's clock

Without a number of steps the device trains until the next line comes.
"""

from __future__ import annotations

import json
import select
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from privatelora.device import DeviceSession
from privatelora.device.data import IGNORE, Example
from privatelora.protocol.errors import PrivateLoraError

PROMPT, LENGTH = 100, 128
FIRST_TOKEN = 1000  # of a vocabulary: those before it are bytes and marks
RATE = 1e-3
M_STD = 0.02  # at zero half of the gradients would vanish

Times = list[tuple[float, float]]


class Worker:
    """A session and what it is asked to do."""

    def __init__(self, me: DeviceSession, seed: int) -> None:
        self.me = me
        self.random = np.random.default_rng(seed)

    def train(self, steps: int, sequences: int) -> Times:
        """Optimizer steps, as many as wanted; 0 goes on until there is something on stdin."""
        times: Times = []
        while len(times) < steps or not (steps or _told()):
            begun = time.monotonic()
            self.me.forward_backward([self._example() for _ in range(sequences)])
            self.me.optim_step(RATE)
            times.append((begun, time.monotonic()))
        return times

    def chat(self, tokens: int) -> Times:
        """Greedy tokens; the prompt is prefilled before any counts."""
        history = self._tokens(PROMPT)
        decoding = self.me.split.decode(history)
        times: Times = []
        for _ in range(1 + tokens):
            begun = time.monotonic()
            history.append(int(decoding.next_logits().argmax()))
            times.append((begun, time.monotonic()))
        decoding.close()
        self.me.remote.release([decoding.sequence])
        return times[1:]

    def _example(self) -> Example:
        tokens = np.array(self._tokens(LENGTH))
        return Example(tokens, np.append(tokens[1:], IGNORE))

    def _tokens(self, count: int) -> list[int]:
        found: list[int] = self.random.integers(FIRST_TOKEN, self.me.model.embedding.shape[0], count).tolist()
        return found


def main(
    url: Annotated[str, typer.Option(help="Base URL of the service.")],
    token: Annotated[str, typer.Option(help="Its bearer token.")],
    cache_dir: Annotated[Path, typer.Option(help="Where downloads are kept.")],
    seed: Annotated[int, typer.Option(help="Of texts and M.")] = 0,
) -> None:
    """Play one complete device."""
    with tempfile.TemporaryDirectory(prefix="privatelora-worker-") as store:
        try:
            with DeviceSession(url, token=token, placement="paper", store_dir=store, cache_dir=cache_dir) as me:
                for weight in me.adapter.parameters():
                    weight.data.normal_(std=M_STD)
                worker = Worker(me, seed)
                me.remote.connect()
                print(json.dumps({"ready": True}), flush=True)
                while line := sys.stdin.readline():
                    errand = json.loads(line)
                    if errand["do"] == "chat":
                        tokens, times = errand["tokens"], worker.chat(errand["tokens"])
                    elif errand["do"] == "train":
                        times = worker.train(errand["steps"], errand["sequences"])
                        tokens = len(times) * errand["sequences"] * LENGTH
                    else:
                        continue  # a word that ended the training before
                    print(json.dumps({"done": times, "tokens": tokens}), flush=True)
        except PrivateLoraError as error:
            sys.exit(f"worker: {error.code}: {error}")


def _told() -> bool:
    """Whether there is a line on stdin, of which no more than one comes at a time."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


if __name__ == "__main__":
    typer.run(main)
