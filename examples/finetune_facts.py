"""Teach a hosted model private facts with ten lines of SDK. Needs a service: `privatelora up`.

python examples/finetune_facts.py http://127.0.0.1:8765
"""

import sys

from privatelora.device import DeviceSession

facts = [
    {"prompt": "My cat is called", "completion": " Miso."},
    {"prompt": "The name of my cat is", "completion": " Miso."},
]
with DeviceSession(sys.argv[1], name="example-facts") as me:
    report = me.finetune(facts, epochs=20)
    print(f"loss {report.history[0].loss:.3f} -> {report.history[-1].loss:.3f}")
    print(f"sent {report.bytes_up:,} bytes, received {report.bytes_down:,}")
    print("My cat is called" + me.generate("My cat is called", max_new_tokens=5))
