"""How often a replay changes the text: `python -m benchmarks.replay_bfloat16`.

A device that lost its connection in mid-text prefills what it had decoded. In exact arithmetic that is the same; in
bfloat16 a matmul over many rows rounds otherwise than one over a single row, and where two tokens are nearly equally
likely, the other one may win. Greedy texts of SmolLM2 with a trained M, each continued from a third, a half and two
thirds of it by the very pass that a replay makes; float32 beside it, where nothing may change.

The shares go to bench-out/replay.json and to a table; lower is better.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks.rows import OUTPUT, Row, Target, show, unmeasured, write
from benchmarks.speed import public_text
from benchmarks.workbench import Workbench
from privatelora.device import DeviceSession

TEXTS = {"bfloat16": 16, "float32": 4}
PROMPT_TOKENS = 40
TOKENS = 48  # of each text
LOST_AT = (TOKENS // 3, TOKENS // 2, 2 * TOKENS // 3)
CHANGED = Target("share", "value", "lower")


def measure(bench: Workbench) -> Iterator[Row]:
    """Share of the replays after which the text went another way, in both dtypes."""
    for dtype, texts in TEXTS.items():
        name = f"replay_changes_text_{dtype}"
        try:
            with bench.session(dtype, placement="paper") as me:
                yield _changed(name, me, texts, bench)
        except Exception as error:  # noqa: BLE001 (whatever it was: it is named, and the other dtype is measured)
            yield unmeasured(name, CHANGED, error)


def _changed(name: str, me: DeviceSession, texts: int, bench: Workbench) -> Row:
    ids = list(me.tokenizer(public_text())["input_ids"])
    prompts = [ids[at : at + PROMPT_TOKENS] for at in range(0, texts * PROMPT_TOKENS, PROMPT_TOKENS)]
    steps = me.finetune([me.tokenizer.decode(prompt) for prompt in prompts], epochs=1).steps  # M is not at zero
    replays = changed = compared = 0
    for number, prompt in enumerate(prompts, 1):
        text = _greedy(me, prompt, TOKENS)
        for lost in LOST_AT:
            again = _greedy(me, prompt + text[:lost], TOKENS - lost)
            agree = [a == b for a, b in zip(again, text[lost:], strict=True)]
            replays += 1
            changed += not all(agree)
            compared += len(agree) if all(agree) else agree.index(False) + 1
        bench.say(f"{name}: {number} of {texts} texts, {changed} of {replays} replays changed theirs")
    return Row(
        name,
        CHANGED,
        changed / replays,
        conditions=f"{replays} replays in {texts} greedy texts of {TOKENS} tokens: {changed} went another way within "
        f"{compared} tokens; SmolLM2-135M-Instruct, every layer inline, rank 64, after {steps} training steps",
    )


def _greedy(me: DeviceSession, history: list[int], count: int) -> list[int]:
    """The next tokens, decoded one by one after a prefill of the whole history; end tokens are tokens like others."""
    history = list(history)
    decoding = me.split.decode(history)
    for _ in range(count):
        history.append(int(decoding.next_logits().argmax()))
    me.remote.release([decoding.sequence])
    return history[-count:]


def main() -> None:
    with Workbench() as bench:
        rows = list(measure(bench))
    write(rows, OUTPUT / "replay.json")
    show(rows)
    sys.exit(any(row.value is None for row in rows))


if __name__ == "__main__":
    main()
