"""The reference of the exactness tests: transformers' own model, with the adapter hooked onto its linears.

Nothing here knows the project's decoder. A and B come from the published set's file, M and LoRA are the device's
values by their names, and torch's autograd gives the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from privatelora.device import DeviceSession
from privatelora.device.data import Example


@dataclass(frozen=True)
class Reference:
    """A whole model in one process, adapted by `values`, leaves of autograd by the device's parameter names."""

    model: PreTrainedModel
    values: dict[str, Tensor]

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Mean nats a labelled token, one sequence at a time."""
        labels = torch.cat([torch.from_numpy(example.labels) for example in examples])
        logits = torch.cat([self.logits(example.tokens.tolist()) for example in examples])
        return F.cross_entropy(logits, labels, ignore_index=-100)

    def gradients(self, examples: Sequence[Example]) -> tuple[float, dict[str, Tensor]]:
        """Loss and its gradient by every value."""
        loss = self.loss(examples)
        found = torch.autograd.grad(loss, list(self.values.values()))
        return float(loss.detach()), dict(zip(self.values, found, strict=True))

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits (n, vocab) of one sequence, without any cache."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0]

    @torch.no_grad()
    def generate(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        """transformers' greedy continuation, up to the end token."""
        prompt = torch.tensor([tokens])
        found = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        new = found[0, len(tokens) :].tolist()
        return new[:-1] if new[-1] == self.model.generation_config.eos_token_id else new


@contextmanager
def reference(model: PreTrainedModel, me: DeviceSession, data_dir: Path) -> Iterator[Reference]:
    """The model with a copy of the session's adapter on it, until the block ends; `data_dir` is the service's."""
    values = {name: p.detach().clone().requires_grad_() for name, p in me.adapter.named_parameters()}
    file = data_dir / "sets" / f"{me.identity.set_hash}.safetensors"
    published = load_file(file) if me.placement.inline else {}
    spec, settings = me.settings.spec, me.settings
    handles = adapt(
        model, values, published, spec.rank_down, spec.rank_up, settings.lora_alpha / settings.lora_rank
    )  # fmt: skip
    try:
        yield Reference(model, values)
    finally:
        for handle in handles:
            handle.remove()


def adapt(
    model: PreTrainedModel,
    values: Mapping[str, Tensor],
    published: Mapping[str, Tensor],
    rank_down: int,
    rank_up: int,
    lora_scale: float,
) -> list[torch.utils.hooks.RemovableHandle]:
    """Add `v_p B_p` to q, k and v of layers that have an M, and `scale B A x` to linears that have a LoRA."""

    def inline(l: int, p: int, x: Tensor) -> Tensor:
        a = published[f"layer.{l}.a"][:, :rank_down]  # (E, r_down, d)
        b = published[f"layer.{l}.b.{'qkv'[p]}"][:rank_up]  # (r_up, d_p)
        u = torch.einsum("bnd,erd->bner", x, a)
        v = torch.einsum("bner,ero->bneo", u, values[f"m.{l}.weight"]).flatten(2)  # (b, n, 3 r_up)
        if f"m.{l}.w1" in values:
            v = v + F.silu(u.flatten(2) @ values[f"m.{l}.w1"]) @ values[f"m.{l}.w2"]
        return v[..., p * rank_up : (p + 1) * rank_up] @ b

    def lora(l: int, name: str, x: Tensor) -> Tensor:
        return lora_scale * (x @ values[f"lora.{l}.a.{name}"].T) @ values[f"lora.{l}.b.{name}"].T

    handles = []
    for l, layer in enumerate(model.model.layers):
        for name, linear in linears(layer).items():
            if f"lora.{l}.a.{name}" in values:
                handles.append(linear.register_forward_hook(lambda _, x, y, l=l, name=name: y + lora(l, name, x[0])))
            if f"m.{l}.weight" in values and name in "qkv":
                p = "qkv".index(name)
                handles.append(linear.register_forward_hook(lambda _, x, y, l=l, p=p: y + inline(l, p, x[0])))
    return handles


def linears(layer: nn.Module) -> dict[str, nn.Module]:
    """Every linear of one of transformers' layers, by its short name."""
    return {
        name.removesuffix("_proj"): getattr(block, name)
        for block, names in ((layer.self_attn, "q k v o"), (layer.mlp, "gate up down"))
        for name in (f"{short}_proj" for short in names.split())
    }


def difference(ours: Tensor, theirs: Tensor) -> float:
    """norm(a - b) / norm(b), in double precision."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())
