"""Take your adapter along: export it as PEFT's files, for the whole model anywhere.

python examples/export_to_peft.py http://127.0.0.1:8765 my-adapter/
"""

import sys

from privatelora.device import DeviceSession

with DeviceSession(sys.argv[1], name="example-export", rank=16) as me:
    me.finetune([{"messages": [{"role": "user", "content": "Who feeds the fish?"},
                               {"role": "assistant", "content": "Ines feeds the fish."}]}], epochs=10)  # fmt: skip
    me.export_peft(sys.argv[2])
    print(f"wrote {sys.argv[2]}: load it with peft.PeftModel.from_pretrained(model, {sys.argv[2]!r})")
