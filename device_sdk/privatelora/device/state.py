"""A device's trainable state as Flower records: M, LoRA and AdamW's moments, and what they belong to.

    RecordDict   "adapter", "exp_avg", "exp_avg_sq": ArrayRecord      by parameter name, float32
                 "progress": ConfigRecord                              how far the last fine-tune came
                 "identity": ConfigRecord                              model, set, placement and adapter settings

`local_round` takes and leaves such a dict, `store.py` writes it to disk, and `Identity` refuses one that was made for
another model, set or shape. None of it is ever sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from flwr.common import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from privatelora.device.adapters import Adapter, AdapterSettings
from privatelora.protocol.adapter import AdapterSpec
from privatelora.protocol.errors import IncompatibleError, StoreError
from privatelora.protocol.placement import Placement

ADAPTER, MOMENTS, PROGRESS, IDENTITY = "adapter", ("exp_avg", "exp_avg_sq"), "progress", "identity"


@dataclass(frozen=True)
class Identity:
    """What an adapter was made for; another is refused."""

    model_hash: str
    set_hash: str | None
    placement: Placement
    settings: AdapterSettings

    def to_record(self) -> ConfigRecord:
        return ConfigRecord({"json": json.dumps(asdict(self), sort_keys=True)})

    @classmethod
    def from_record(cls, record: ConfigRecord) -> Identity:
        """Read an identity; raises `StoreError` where it is not one."""
        try:
            values = json.loads(str(record["json"]))
            spec = AdapterSpec(**values["settings"].pop("spec"))
            placement = values["placement"]
            placement["inline"] = tuple(placement["inline"])
            settings = AdapterSettings(spec=spec, **values["settings"])
            return cls(values["model_hash"], values["set_hash"], Placement(**placement), settings)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"the saved adapter does not name its model ({error!r}); load another file") from None

    def require(self, other: Identity) -> None:
        """Raise `IncompatibleError` if `other`, a saved adapter's, is not for this session; the seed may differ."""
        mine, theirs = asdict(self), asdict(other)
        mine["settings"].pop("seed"), theirs["settings"].pop("seed")
        changed = [name for name in mine if mine[name] != theirs[name]]
        if not changed:
            return
        details = "; ".join(f"{name}: saved {_short(theirs[name])}, here {_short(mine[name])}" for name in changed)
        raise IncompatibleError(
            f"the saved adapter does not belong to this session ({details}); connect to the service and settings that "
            "it was made for, or start a new one under another name="
        )


def adapter_state(adapter: Adapter, optimizer: torch.optim.AdamW, identity: Identity) -> RecordDict:
    """The adapter and its optimizer's moments as records (copies)."""
    records = {ADAPTER: _to_record({name: p.detach() for name, p in adapter.named_parameters()})}
    for moment in MOMENTS:
        records[moment] = _to_record(
            {name: optimizer.state[p][moment] for name, p in adapter.named_parameters() if p in optimizer.state}
        )
    return RecordDict({**records, IDENTITY: identity.to_record(), PROGRESS: ConfigRecord()})


def restore(state: RecordDict, adapter: Adapter, optimizer: torch.optim.AdamW, step: int) -> None:
    """Put records back; with `step` 0 the moments start anew."""
    adapter.load_arrays(_to_tensors(state.array_records.get(ADAPTER, ArrayRecord())))  # none where nothing is trained
    optimizer.state.clear()
    if step:
        moments = {moment: _to_tensors(state.array_records.get(moment, ArrayRecord())) for moment in MOMENTS}
        for name, parameter in adapter.named_parameters():
            if name not in moments[MOMENTS[0]]:
                raise StoreError("the saved optimizer state is not whole; run without resume")
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{moment: tensors[name] for moment, tensors in moments.items()},
            }


def _to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord(array_dict={name: Array(np.array(t.numpy())) for name, t in tensors.items()})


def _to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}


def _short(value: object) -> str:
    text = value[:12] if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."
