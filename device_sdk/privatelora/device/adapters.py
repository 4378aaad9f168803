"""What a device trains: M for the service's inline layers, and LoRA for the layers that it holds itself.

The wire knows `u` (n, E, r_down) and `v` (n, 3, r_up), never how one becomes the other. A kind of M is a module with
that one mapping, registered in `M_KINDS`: adding a third kind touches this file only. `Adapter` holds one M an inline
layer and one LoRA a trained device layer; its parameters are what the optimizer moves and the local store keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from privatelora.decoder.config import ModelConfig
from privatelora.decoder.layer import Lora
from privatelora.protocol.adapter import PROJECTIONS, AdapterSpec
from privatelora.protocol.errors import ConfigurationError
from privatelora.protocol.placement import Placement


@dataclass(frozen=True)
class AdapterSettings:
    """How a device's adapter is built.

    Parameters
    ----------
    spec : kind and ranks of the service's A and B that M works between.
    m_kind : one of `M_KINDS`.
    m_hidden : hidden width of the `mlp` kind.
    lora_rank, lora_alpha : of the LoRA on device-held layers.
    seed : of the initial values.
    """

    spec: AdapterSpec = field(default_factory=AdapterSpec)
    m_kind: str = "linear"
    m_hidden: int = 256
    lora_rank: int = 16
    lora_alpha: float = 16.0
    seed: int = 0


class LinearM(nn.Module):
    """v = M(u), the paper's: zero at the start. With E encoders M is block-diagonal over them."""

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__()
        spec = settings.spec
        width = len(PROJECTIONS) // spec.encoders * spec.rank_up
        self.weight = nn.Parameter(torch.zeros(spec.encoders, spec.rank_down, width))

    def forward(self, u: Tensor) -> Tensor:
        """u (n, E, r_down) to v (n, 3, r_up)."""
        v = torch.bmm(u.transpose(0, 1), self.weight)  # (E, n, 3/E * r_up)
        return v.transpose(0, 1).reshape(u.shape[0], len(PROJECTIONS), -1)


W1_STD = 0.02
"""Of the initial W1, a normal distribution. Larger, and each step of the optimizer moves v further: with nn.Linear's
uniform one (0.07), `gsm8k_mlp_r64` had a share of 0.955 of LoRA's gain, with this one 0.995, one run each."""


class MlpM(LinearM):
    """v = M(u) + W2 silu(u W1): better at the same bytes; zero at the start, through W2."""

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__(settings)
        spec, hidden = settings.spec, settings.m_hidden
        self.w1 = nn.Parameter(torch.empty(spec.encoders * spec.rank_down, hidden))
        self.w2 = nn.Parameter(torch.zeros(hidden, len(PROJECTIONS) * spec.rank_up))
        nn.init.normal_(self.w1, std=W1_STD)

    def forward(self, u: Tensor) -> Tensor:
        hidden = nn.functional.silu(u.flatten(1) @ self.w1)  # (n, hidden)
        return super().forward(u) + (hidden @ self.w2).view(u.shape[0], len(PROJECTIONS), -1)


M_KINDS: dict[str, type[LinearM]] = {"linear": LinearM, "mlp": MlpM}


class LayerLora(nn.Module):
    """LoRA on all linears of one device-held layer; B is zero at the start (Hu et al., arXiv 2106.09685)."""

    def __init__(self, config: ModelConfig, settings: AdapterSettings) -> None:
        super().__init__()
        self.scale = settings.lora_alpha / settings.lora_rank
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, (width_in, width_out) in projection_sizes(config).items():
            self.a[name] = nn.Parameter(torch.empty(settings.lora_rank, width_in))
            self.b[name] = nn.Parameter(torch.zeros(width_out, settings.lora_rank))
            nn.init.kaiming_uniform_(self.a[name], a=math.sqrt(5))

    def weights(self) -> Lora:
        """A and scaled B by projection, as the decoder takes them."""
        return {name: (self.a[name], self.b[name] * self.scale) for name in self.a}


class Adapter(nn.Module):
    """All that one device trains at one placement; float32, on the device only."""

    def __init__(self, config: ModelConfig, placement: Placement, settings: AdapterSettings) -> None:
        super().__init__()
        if settings.m_kind not in M_KINDS:
            raise ConfigurationError(f"m_kind {settings.m_kind!r} is unknown; use one of {', '.join(M_KINDS)}")
        if settings.lora_rank < 1 or settings.m_hidden < 1 or not 0 < settings.lora_alpha < math.inf:
            raise ConfigurationError(
                f"lora_rank {settings.lora_rank} and m_hidden {settings.m_hidden} must be 1 or more, and lora_alpha "
                f"{settings.lora_alpha} above 0"
            )
        self.settings = settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.m = nn.ModuleDict({str(l): M_KINDS[settings.m_kind](settings) for l in placement.inline})
            trained = placement.trained_layers(config.num_layers)
            self.lora = nn.ModuleDict({str(l): LayerLora(config, settings) for l in trained})

    def delta(self, layer: int, u: Tensor) -> Tensor:
        """v (n, 3, r_up) of an inline layer for u (n, E, r_down), float32."""
        v: Tensor = self.m[str(layer)](u.float())
        return v

    def layer_lora(self, layer: int) -> Lora | None:
        """LoRA of a device-held layer, None where it is not trained."""
        if str(layer) not in self.lora:
            return None
        lora: Lora = self.lora[str(layer)].weights()  # type: ignore[operator]  # a ModuleDict types its values as Module
        return lora

    def count(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def load_arrays(self, tensors: Mapping[str, Tensor]) -> None:
        """Take values by parameter name; raises `ConfigurationError` where names or shapes differ."""
        own = dict(self.named_parameters())
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {name: tuple(parameter.shape) for name, parameter in own.items()}:
            raise ConfigurationError(
                f"the saved adapter's {len(shapes)} tensors do not fit this session's {len(own)}; open the session "
                "with the placement, ranks and kind of M that it was saved with"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])


def projection_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear of a layer, by the names that LoRA uses."""
    d, m = config.hidden_size, config.intermediate_size
    return {
        "q": (d, config.q_size),
        "k": (d, config.kv_size),
        "v": (d, config.kv_size),
        "o": (config.q_size, d),
        "gate": (d, m),
        "up": (d, m),
        "down": (m, d),
    }
