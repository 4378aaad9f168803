"""The device's half: your text, your adapter, and a frozen model that someone else hosts.

from privatelora.device import DeviceSession

with DeviceSession("http://127.0.0.1:8765") as me:
    me.finetune([{"prompt": "My cat is called", "completion": " Miso."}])
    print(me.generate("My cat is called"))
"""

from privatelora.device.adapters import AdapterSettings
from privatelora.device.data import Dataset, DataWarning, Example
from privatelora.device.session import DeviceSession, Evaluation, StepResult
from privatelora.device.training import FinetuneReport, StepRecord, local_round

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
