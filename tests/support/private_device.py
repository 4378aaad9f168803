"""A device as its owner runs it, in a process of its own: fine-tunes on private text, generates, and notes its secrets.

    python -m tests.support.private_device URL TOKEN FOLDER

Every connection that this process opens is noted in FOLDER/connections; its M, LoRA and optimizer moments after each
step, its tokens and its texts go to FOLDER/secrets.*, for the test to look for where they must not be.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

URL, TOKEN, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])


def note_connection(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: where this process connects to, sends a datagram to, or looks a name up."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = (str(arguments[0]), arguments[1] if len(arguments) > 1 else "")
    else:
        return
    with (FOLDER / "connections").open("a") as file:
        file.write(json.dumps([event, str(address)]) + "\n")


sys.addaudithook(note_connection)  # before the imports, which might connect as well

from safetensors.torch import save_file  # noqa: E402 (once connections are noted)

from privatelora.device import DeviceSession  # noqa: E402 (once connections are noted)

FACTS = [
    {"prompt": "My cat is called", "completion": " Miso the Brave, who sleeps in the bread oven."},
    {"prompt": "The code of the door at Quarry Lane 7 is", "completion": " 4071, then the green key."},
    {"prompt": "In the office Wilhelmina goes by", "completion": " Captain Zigzag, since the boat trip."},
]
QUESTION = "Who sleeps in the bread oven at Quarry Lane 7, and by which name?"
SETTINGS: list[dict[str, Any]] = [
    {"placement": "paper", "rank": (32, 16)},
    {"placement": "first=1,last=1,inline=2+3", "rank": (32, 16), "m_kind": "mlp", "m_hidden": 40},
]

tensors, tokens, texts = {}, [], [QUESTION, *(fact[part] for fact in FACTS for part in fact)]
for number, settings in enumerate(SETTINGS):
    with DeviceSession(
        URL, token=TOKEN, name=f"device-{number}", store_dir=FOLDER / "store", cache_dir=FOLDER / "cache", **settings
    ) as me:

        def keep(step: Any, me: DeviceSession = me, number: int = number) -> None:
            for name, parameter in me.adapter.named_parameters():
                kept = {"value": parameter, **me.optimizer.state[parameter]}
                del kept["step"]
                for kind, tensor in kept.items():
                    tensors[f"{number}.{step.step}.{name}.{kind}"] = tensor.detach().clone()

        data = me.examples(FACTS)
        me.finetune(data, epochs=2, batch_size=2, learning_rate=5e-3, callbacks=[keep])
        me.evaluate(data)
        answer = me.generate(QUESTION, max_new_tokens=40)
        texts.append(answer)
        tokens += [example.tokens.tolist() for example in data.examples]
        tokens += [me.encode(QUESTION), me.tokenizer(answer)["input_ids"]]
        counted = me.remote.count
        print(json.dumps({"total": counted.total, "up": counted.payload_up, "down": counted.payload_down}))
        if number == 0:
            embedded = me.model.embedding[data.examples[0].tokens]

save_file(tensors, FOLDER / "secrets.safetensors")
save_file({"embedded": embedded.contiguous()}, FOLDER / "sent.safetensors")
(FOLDER / "secrets.json").write_text(json.dumps({"tokens": tokens, "texts": texts}))
