"""Transformers' side of the comparisons: the same adapter in one process, and LoRA as most people train it.

Written without any of the project's mathematics: hooks on transformers' projections, and `peft`. `speed.py` times the
first, `quality.py` trains the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from privatelora.device.data import IGNORE, Example, batches

LORA_RATE = 6e-3
WARMUP_STEPS, CLIP_NORM = 10, 1.0


def loss_of(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Mean nats a labelled token of a batch, padded on the right; labels are shifted already."""
    length = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORE)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.from_numpy(example.tokens)
        labels[row, : len(example.labels)] = torch.from_numpy(example.labels)
    # causal attention never looks at what is padded on the right; without padding no mask is needed
    mask = None
    if min(len(example.tokens) for example in examples) < length:
        mask = torch.tensor([[i < len(example.tokens) for i in range(length)] for example in examples]).long()
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits  # (rows, length, vocab)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


@torch.inference_mode()
def held_out_nats(model: nn.Module, examples: Sequence[Example], batch_size: int = 4) -> float:
    """Nats a labelled token over a data set."""
    total, count = 0.0, 0
    for first in range(0, len(examples), batch_size):
        batch = examples[first : first + batch_size]
        labelled = sum(int((example.labels != IGNORE).sum()) for example in batch)
        total += float(loss_of(model, batch)) * labelled
        count += labelled
    return total / count


def train_lora(
    model: PreTrainedModel, examples: Sequence[Example], batch_size: int, seed: int, say: Callable[[str], None]
) -> PeftModel:
    """LoRA r=16, alpha=32 on q, k and v: one pass by the recipe that all rows share, in `finetune`'s batch order."""
    wanted = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.0)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, wanted)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    order = batches(examples, batch_size, seed, 0)
    warmup = min(WARMUP_STEPS, len(order) // 2)
    for step, rows in enumerate(order):
        share = max(0, step - warmup) / (len(order) - warmup)
        rate = LORA_RATE * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * share)))
        optimizer.param_groups[0]["lr"] = rate
        loss = loss_of(adapted, [examples[row] for row in rows])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            say(f"LoRA: step {step + 1} of {len(order)}, loss {float(loss.detach()):.3f}")
    return adapted.eval()


@contextmanager
def inline_adapter(
    model: PreTrainedModel, a: Mapping[int, Tensor], b: Mapping[int, Mapping[str, Tensor]], m: Mapping[int, Tensor]
) -> Iterator[None]:
    """The adapter of DESIGN section 2 with one encoder a layer and a linear M, by hooks on q_proj, k_proj and v_proj.

    a (r, d) and b q|k|v (r, d_p) by layer in the model's dtype, m (r, 3 r) float32, which receive gradients.
    """
    handles = []
    for l, layer in enumerate(model.model.layers):
        attention, found = layer.self_attn, {}

        def encode(module: nn.Module, args: tuple[Tensor, ...], l: int = l, found: dict[str, Tensor] = found) -> None:
            u = F.linear(args[0], a[l])  # (rows, length, r)
            found["q"], found["k"], found["v"] = (u.float() @ m[l]).to(u.dtype).chunk(3, dim=-1)

        handles.append(attention.q_proj.register_forward_pre_hook(encode))
        for name in ("q", "k", "v"):

            def add(
                module: nn.Module,
                args: object,
                out: Tensor,
                name: str = name,
                l: int = l,
                found: dict[str, Tensor] = found,
            ) -> Tensor:
                return out + found[name] @ b[l][name]

            handles.append(getattr(attention, f"{name}_proj").register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
