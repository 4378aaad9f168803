"""How much text an operator who looks can read: `python -m benchmarks.leakage`.

The attacks of DESIGN section 4 on what a device really sends, recorded at its socket while it trains on text of its
own. The operator has what every operator has: the public weights, and the adapter sets that it published itself.

    paper      h_0 goes up: the nearest embedding is the token; the same behind A of the first layer at rank 16
               dL/dh_L goes up: with the logits that the operator can compute, it names each label
    one-trip   h_2 goes up, after two layers with trained LoRA: a linear decoder that was fitted to public text

The shares read go to bench-out/leakage.json and to a table; lower is better for the device's owner.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from benchmarks.quality import DATA
from benchmarks.rows import OUTPUT, Row, Target, show, unmeasured, write
from benchmarks.speed import public_text
from benchmarks.workbench import Workbench
from privatelora.decoder.functions import rms_norm
from privatelora.decoder.layer import run_layer
from privatelora.decoder.tensors import to_tensor
from privatelora.device import DeviceSession, exchange
from privatelora.device.data import IGNORE, Dataset
from privatelora.device.model import DeviceModel
from privatelora.protocol.frames import Frame, Kind, Phase
from privatelora.protocol.messages import Blob

DTYPE = "bfloat16"
STEPS, BATCH_SIZE = 8, 4  # of training before the step that is attacked, so that M and LoRA are not at zero
RANK = 16
PUBLIC_WINDOWS, WINDOW = 150, 128
RIDGE = 1e-3  # of the mean diagonal
READ = Target("share", "value", "lower")


@dataclass
class Looking:
    """What the operator has of one training step (frames), and the device's truth to judge guesses by."""

    up: list[Frame] = field(default_factory=list)
    down: list[Frame] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))  # (n,)
    labels: Tensor = field(default_factory=lambda: torch.empty(0))  # (n_o,)


def _tensor(frames: list[Frame], kind: Kind, phase: Phase) -> Tensor:
    """The one tensor of that kind and phase, float32."""
    frame = next(frame for frame in frames if frame.kind is kind and frame.phase is phase)
    return to_tensor(frame.array(), frame.dtype, torch.float32)


def measure(bench: Workbench) -> Iterator[Row]:
    """Every attack, in order."""
    for placement, attacks in (("paper", _on_paper), ("one-trip", _on_one_trip)):
        try:
            with bench.session(DTYPE, placement=placement) as me:
                looking, source = _watch(me, bench)
                yield from attacks(me, looking, source)
        except Exception as error:  # noqa: BLE001 (whatever it was: it is named, and the other attacks are run)
            yield unmeasured(f"leak_{placement.replace('-', '_')}", READ, error)


def _on_paper(me: DeviceSession, looking: Looking, source: str) -> Iterator[Row]:
    model = me.model
    embedding, norm, head = model.embedding.float(), model.norm.float(), model.head.float()
    h_0, tokens = _tensor(looking.up, Kind.HIDDEN, Phase.TRAIN), looking.tokens  # (n, d), (n,)
    yield _row(
        "leak_tokens_from_h0", _nearest(h_0, embedding), tokens, f"nearest embedding to h_0 that goes up; {source}"
    )

    a, input_norm = _first_layer(me)  # (RANK, d), (d,)
    h_x, table_x = (rms_norm(h, input_norm, me.config.norm_eps) @ a.T for h in (h_0, embedding))
    guess = _nearest(h_x, table_x)
    yield _row("leak_tokens_from_ax_rank16", guess, tokens, f"nearest A x of a token at rank {RANK}; {source}")

    # The operator made h_L, and from that it has the logits' softmax p; dL/dh_L = J^T W^T (p - 1_label) / n with
    # J the norm's Jacobian, which leaves J^T W_label as the only unknown.
    grad = _tensor(looking.up, Kind.GRAD_HIDDEN, Phase.BACKWARD)  # (n_o, d)
    h_l = _tensor(looking.down, Kind.HIDDEN, Phase.TRAIN)  # (n_o, d)
    scale = h_l.square().mean(-1, keepdim=True).add(me.config.norm_eps).rsqrt()
    unit = h_l * scale  # (n_o, d), of rms 1

    def through_norm(g: Tensor) -> Tensor:
        """J g of each row, J symmetric but for the norm's weight, which is in g already."""
        return scale * (g - unit * (g * unit).mean(-1, keepdim=True))

    weighted = head * norm  # (vocab, d)
    p = torch.softmax(unit @ weighted.T, dim=-1)
    unknown = through_norm(p @ weighted) - len(grad) * grad  # J^T W_label
    dots = through_norm(unknown) @ weighted.T  # (n_o, vocab)
    lengths = scale.square() * (weighted.square().sum(-1) - (unit @ weighted.T).square() / unit.shape[-1])
    guess = (lengths - 2 * dots).argmin(-1)
    yield _row(
        "leak_labels_from_gradient", guess, looking.labels, f"label whose gradient is nearest to dL/dh_L; {source}"
    )


def _on_one_trip(me: DeviceSession, looking: Looking, source: str) -> Iterator[Row]:
    """h_2 of public text, by the public weights, against its embeddings: a linear map, then the nearest embedding."""
    model = me.model
    ids = torch.tensor(me.tokenizer(public_text())["input_ids"][: PUBLIC_WINDOWS * WINDOW])
    with torch.inference_mode():
        h = torch.cat([_plain_first(model, window) for window in ids.split(WINDOW)]).float()  # (N, d)
    embedding = model.embedding.float()
    mean = h.mean(0)
    x = h - mean
    gram = x.T @ x
    gram += RIDGE * gram.diagonal().mean() * torch.eye(gram.shape[0])
    decoder = torch.linalg.solve(gram, x.T @ (embedding[ids] - embedding[ids].mean(0)))  # (d, d)
    decoded = (_tensor(looking.up, Kind.HIDDEN, Phase.TRAIN) - mean) @ decoder + embedding[ids].mean(0)
    guess = _nearest(decoded, embedding, by_angle=True)
    what = f"linear decoder on h_2, fitted to {len(ids):,} tokens of public text; {source}"
    yield _row("leak_tokens_from_h2_linear_decoder", guess, looking.tokens, what)


def _watch(me: DeviceSession, bench: Workbench) -> tuple[Looking, str]:
    """Train a little, then record one more step at the socket."""
    rows, source = _private_text()
    data = me.examples(rows)
    me.finetune(Dataset(data.examples[BATCH_SIZE:], 0), epochs=1, batch_size=BATCH_SIZE)
    me.remote.disconnect()  # the next step opens a connection, which is watched
    examples = data.examples[:BATCH_SIZE]
    with _recorded() as looking:
        me.forward_backward(examples)
    looking.tokens = torch.cat([torch.from_numpy(example.tokens) for example in examples])
    labels = torch.cat([torch.from_numpy(example.labels) for example in examples])
    looking.labels = labels[labels != IGNORE]
    bench.say(f"{me.placement.describe(me.config.num_layers)}: {len(looking.up)} frames went up in one step")
    return looking, f"{source}, {DTYPE}, after {STEPS} steps of training"


@contextmanager
def _recorded() -> Iterator[Looking]:
    """Keep every frame of connections opened meanwhile."""
    looking = Looking()

    class Recording(exchange.Connection):
        def send(self, frame: Frame) -> None:
            looking.up.append(frame)
            super().send(frame)

        def receive(self) -> Frame:
            frame = super().receive()
            looking.down.append(frame)
            return frame

    with mock.patch.object(exchange, "Connection", Recording):
        yield looking


def _private_text() -> tuple[list[object], str]:
    """What the device trains on: problems where they are at hand, else paragraphs that every Python has."""
    count = (STEPS + 1) * BATCH_SIZE
    if DATA.is_file():
        rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()[:count]]
        return [{"text": f"{row['question']}\n{row['answer']}"} for row in rows], "GSM8K problems"
    text = public_text()[-600 * count :]
    return [{"text": text[at : at + 600]} for at in range(0, 600 * count, 600)], "documentation of Python"


def _nearest(points: Tensor, candidates: Tensor, by_angle: bool = False) -> Tensor:
    """Row of `candidates` (vocab, r) that is nearest to each of `points` (n, r)."""
    if by_angle:
        points, candidates = F.normalize(points, dim=-1), F.normalize(candidates, dim=-1)
    return (candidates.square().sum(-1) - 2 * points @ candidates.T).argmin(-1)


def _first_layer(me: DeviceSession) -> tuple[Tensor, Tensor]:
    """A of layer 0 at rank `RANK`, and its input norm, both public."""
    info = me.service.info
    found = next(found for found in info.sets if found.sha256 == me.identity.set_hash)
    with safe_open(me.service.download(Blob(sha256=found.sha256, nbytes=found.nbytes)), framework="pt") as file:
        a = file.get_tensor("layer.0.a")[0, :RANK]
    with safe_open(me.service.download(info.model.parts["layer.0"]), framework="pt") as file:
        return a, file.get_tensor("input_norm").float()


def _plain_first(model: DeviceModel, tokens: Tensor) -> Tensor:
    """h_first (n, d) of a text by the public weights alone."""
    ragged = model.ragged([len(tokens)])
    h = model.embedding[tokens]
    for l in model.first:
        h = run_layer(model.config, l, model.layers[l], h, ragged)
    return h


def _row(name: str, guess: Tensor, truth: Tensor, what: str) -> Row:
    right = float((guess == truth).double().mean())
    return Row(name, READ, right, conditions=f"{what}; {len(truth)} to guess")


def main() -> None:
    with Workbench() as bench:
        rows = list(measure(bench))
    write(rows, OUTPUT / "leakage.json")
    show(rows)
    sys.exit(any(row.value is None for row in rows))


if __name__ == "__main__":
    main()
