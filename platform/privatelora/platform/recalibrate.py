"""`python -m privatelora.platform.recalibrate JSON`: makes a calibrated set, in a process that the job may end.

Reads model, data_dir, dtype, device, torch_threads, seed and max_rank; prints what it published as one line of JSON.
It ends when its stdin does, as it does when the worker is killed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

from privatelora.cloud.backbone import MAX_RANK, calibrate
from privatelora.cloud.sets import SetStore
from privatelora.decoder.publish import publish_model
from privatelora.decoder.weights import load_layer
from privatelora.platform.models import source_of
from privatelora.protocol.errors import PrivateLoraError


def main(asked: dict[str, object]) -> None:
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    threading.Thread(target=_end_with_stdin, daemon=True).start()
    if asked["torch_threads"]:
        torch.set_num_threads(int(str(asked["torch_threads"])))
    data_dir, device = Path(str(asked["data_dir"])), str(asked["device"])
    parts = publish_model(source_of(str(asked["model"])), data_dir, getattr(torch, str(asked["dtype"])), say)
    layers = {l: load_layer(parts.parts[f"layer.{l}"], parts.config, device) for l in range(parts.config.num_layers)}
    rank = min(int(str(asked["max_rank"] or MAX_RANK)), MAX_RANK)
    info = calibrate(parts, layers, SetStore(data_dir / "sets"), say, rank, int(str(asked["seed"])))
    made = {"nbytes": info.nbytes, "max_rank_down": info.max_rank_down, "max_rank_up": info.max_rank_up}
    print(json.dumps(made))


def _end_with_stdin() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except PrivateLoraError as error:
        sys.exit(error.message)
