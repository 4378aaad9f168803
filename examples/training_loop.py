"""Write your own training loop from the verbs beneath `finetune`, with a loss of your own.

python examples/training_loop.py http://127.0.0.1:8765
"""

import sys

import torch
import torch.nn.functional as F

from privatelora.device import DeviceSession


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with label smoothing; logits (n, vocab), labels (n,)."""
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


with DeviceSession(sys.argv[1], name="example-loop", placement="one-trip") as me:
    data = me.examples(["The door code of the studio is 4417.", "Our studio's door opens with the code 4417."])
    for step in range(8):
        result = me.forward_backward(data.examples, smoothed)
        me.optim_step(learning_rate=5e-3)
        print(f"step {step + 1}: loss {result.loss:.3f} over {result.labelled_tokens} tokens")
    me.save("studio.adapter")
    for piece in me.stream("The door code of the studio is", max_new_tokens=8):
        print(piece, end="", flush=True)
    print()
