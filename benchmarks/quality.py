"""What each placement learns: held-out nats on GSM8K after one pass, as a share of the gain of LoRA on one machine.

From ../shared/data/gsm8k_2000.jsonl: some problems train a device over a real socket, and peft's LoRA in this process;
others, held out, judge both. The recipe is one for all: bfloat16 base, float32 adapters, AdamW without decay, 10
warm-up steps, cosine to zero, clip 1.0, batches of 4. LoRA is trained once and serves every row of a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.reference import held_out_nats, train_lora
from benchmarks.rows import ROOT, Row, Target, Unmeasured, unmeasured
from benchmarks.workbench import Workbench
from privatelora.device import StepRecord
from privatelora.device.data import Dataset, Example, load_examples
from privatelora.protocol.placement import Placement

DATA = ROOT.parent / "shared" / "data" / "gsm8k_2000.jsonl"
DTYPE = "bfloat16"
LONGEST = 200  # tokens of prompt, answer and end token; longer rows are left out
TRAINED, HELD_OUT, BATCH_SIZE, SEED = 240, 200, 4, 0
UNIT = "nats/token"

R64, DEVICE_LORA = {"adapter": "calibrated", "rank": 64}, {"lora_rank": 16, "lora_alpha": 16.0}


@dataclass(frozen=True)
class Recipe:
    """Settings of one row's session and its learning rate."""

    settings: dict[str, Any]
    learning_rate: float
    target: Target


RECIPES = {
    # DESIGN section 2's rate for the paper's adapter; the issue names none
    "gsm8k_random_r128": Recipe({"placement": "paper", "adapter": "random", "rank": 128}, 1e-2, Target(UNIT)),
    "gsm8k_calibrated_r64": Recipe({"placement": "paper", **R64}, 5e-3, Target(UNIT, floor=0.95, aim=1.00)),
    "gsm8k_mlp_r64": Recipe(
        {"placement": "paper", **R64, "m_kind": "mlp", "m_hidden": 256}, 5e-3, Target(UNIT, floor=0.96, aim=1.01)
    ),
    "gsm8k_few_trips": Recipe(
        {"placement": Placement(last=8, inline=(2, 7, 12, 17)), **R64, "m_kind": "mlp", "m_hidden": 512, **DEVICE_LORA},
        5e-3,
        Target(UNIT, floor=0.96, aim=1.01),
    ),
    "gsm8k_one_trip": Recipe(
        {"placement": Placement(first=2, last=2), **DEVICE_LORA}, 5e-3, Target(UNIT, floor=0.94, aim=1.00)
    ),
    "gsm8k_one_trip_large": Recipe(
        {"placement": Placement(first=2, last=8), **DEVICE_LORA}, 5e-3, Target(UNIT, floor=0.96, aim=1.01)
    ),
}
TARGETS = {name: recipe.target for name, recipe in RECIPES.items()}


@dataclass(frozen=True)
class Common:
    """What all rows of a run share: the examples, and the nats of the plain model and of LoRA on those held out."""

    trained: Dataset
    held_out: Dataset
    base_nats: float
    lora_nats: float


def measure(names: Sequence[str], bench: Workbench, trained: int = TRAINED, held_out: int = HELD_OUT) -> Iterator[Row]:
    """Measure the rows called `names`, in order."""
    common: Common | None = None
    for name in names:
        try:
            common = common or _common(bench, trained, held_out)
            yield _row(name, bench, common)
        except Exception as error:  # noqa: BLE001 (whatever it was: this row is named, and the others are measured)
            yield unmeasured(name, RECIPES[name].target, error)


def _row(name: str, bench: Workbench, common: Common) -> Row:
    recipe = RECIPES[name]

    def tell(step: StepRecord) -> None:
        if step.step % 10 == 0:
            bench.say(f"{name}: step {step.step} of {step.total_steps}, loss {step.loss:.3f}")

    with bench.session(DTYPE, **recipe.settings) as me:
        report = me.finetune(
            common.trained,
            epochs=1,
            batch_size=BATCH_SIZE,
            learning_rate=recipe.learning_rate,
            seed=SEED,
            callbacks=[tell],
        )
        nats = me.evaluate(common.held_out, batch_size=BATCH_SIZE).loss
        placement = me.placement.describe(me.config.num_layers)
        trips, numbers = me.placement.round_trips, me.adapter.count()
    wire = (report.bytes_up + report.bytes_down) / report.tokens / 1024
    return Row(
        name,
        recipe.target,
        value=nats,
        baseline=common.lora_nats,
        ratio=(common.base_nats - nats) / (common.base_nats - common.lora_nats),
        conditions=f"{placement}, {trips} round trips a token, {numbers:,} trained numbers, rate "
        f"{recipe.learning_rate:g}; {DTYPE}, {len(common.trained.examples)} problems trained, "
        f"{len(common.held_out.examples)} held out; {report.tokens_per_s:.0f} tokens/s, {wire:.1f} KiB a token trained",
        extra={"base_nats": common.base_nats, "nats": nats, "lora_nats": common.lora_nats},
    )


def _common(bench: Workbench, trained: int, held_out: int) -> Common:
    """The first and the last short problems, the model as it is on these, and LoRA trained on those."""
    if not DATA.is_file():
        raise Unmeasured(f"{DATA} is missing; put the GSM8K rows there (fields question and answer, one JSON a line)")
    with bench.session(DTYPE, placement="one-trip") as me:
        examples = short_examples(me.tokenizer)
    if len(examples) < trained + held_out:
        raise Unmeasured(
            f"{DATA} has {len(examples)} rows of at most {LONGEST} tokens; {trained + held_out} are needed"
        )
    first, last = examples[:trained], examples[-held_out:]
    model = bench.transformers_model(DTYPE)
    base = held_out_nats(model, last)
    bench.say(f"base: {base:.4f} nats on {len(last)} problems")
    adapted = train_lora(model, first, BATCH_SIZE, SEED, bench.say)
    try:
        lora = held_out_nats(adapted, last)
    finally:
        adapted.unload()  # other rows want the plain model
    bench.say(f"LoRA: {lora:.4f} nats")
    if lora >= base:
        raise Unmeasured(f"LoRA on one machine gained nothing ({base:.3f} to {lora:.3f} nats), so there are no shares")
    return Common(Dataset(tuple(first), 0), Dataset(tuple(last), 0), base, lora)


def short_examples(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Every problem of at most `LONGEST` tokens, in the file's order, with labels on answer and end token."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    pairs = [{"prompt": f"Question: {row['question']}\nAnswer: ", "completion": row["answer"]} for row in rows]
    found = load_examples(pairs, tokenizer, context_length=4096).examples
    return [example for example in found if len(example.tokens) <= LONGEST]
