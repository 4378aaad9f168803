"""The device's half: your text, your adapter, and a frozen model that someone else hosts.

    from privatelora.device import DeviceSession

    with DeviceSession("http://127.0.0.1:8765") as me:
        me.finetune([{"prompt": "My cat is called", "completion": " Miso."}])
        print(me.generate("My cat is called"))

The names below are loaded when they are first used, so that `privatelora-device --help` does not wait for torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# A device waits for the service most of the time. torch's idle threads sleep meanwhile, since a service on this machine
# needs their cores. OpenMP reads it when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from privatelora.device.adapters import AdapterSettings
    from privatelora.device.data import Dataset, DataWarning, Example
    from privatelora.device.session import DeviceSession, Evaluation, StepResult
    from privatelora.device.training import FinetuneReport, StepRecord, local_round

_HOME = {
    "AdapterSettings": "adapters",
    "DataWarning": "data",
    "Dataset": "data",
    "DeviceSession": "session",
    "Evaluation": "session",
    "Example": "data",
    "FinetuneReport": "training",
    "StepRecord": "training",
    "StepResult": "session",
    "local_round": "training",
}

__all__ = [
    "AdapterSettings",
    "DataWarning",
    "Dataset",
    "DeviceSession",
    "Evaluation",
    "Example",
    "FinetuneReport",
    "StepRecord",
    "StepResult",
    "local_round",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
