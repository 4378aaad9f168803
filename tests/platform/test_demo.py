"""`privatelora demo`, run for real: ten facts learned over the socket, bytes as the formula says, nothing left running.

The first test is the slow one of the suite: the bundled model, a first start with calibration, and ten epochs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.service import REPOSITORY
from tests.support.tiny import tiny_model

from privatelora.platform.demo import Fact, load_facts

KEYS = [
    "model",
    "adapter_kind",
    "m_kind",
    "placement",
    "rank_down",
    "rank_up",
    "loss_before",
    "loss_after",
    "heldout_tokens",
    "answers",
    "answers_right_before",
    "answers_right_after",
    "m_parameters",
    "train_tokens",
    "train_tokens_per_s",
    "generate_tokens_per_s",
    "payload_bytes_up",
    "payload_bytes_down",
    "expected_payload_bytes_up",
    "expected_payload_bytes_down",
    "frame_overhead_bytes",
    "reduction_vs_device_lora",
    "reduction_by_shape",
    "seconds",
]


@contextmanager
def start(data_dir: Path, output: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process, ended with the block; `data_dir` in its environment is what its children are known by."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PRIVATELORA_", "OMP_", "GOMP_"))
    }
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "privatelora.platform", "demo", "--output", str(output), *options],
        cwd=REPOSITORY,
        env=environment | {"PRIVATELORA_DATA_DIR": str(data_dir), "HF_HUB_OFFLINE": "1", "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()  # it has ended, unless a check has failed


def processes_of(data_dir: Path) -> list[int]:
    """Processes that have `data_dir` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"PRIVATELORA_DATA_DIR={data_dir}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue  # it ended, or belongs to someone else
    return found


def test_the_demo_teaches_ten_facts_over_the_socket(tmp_path: Path) -> None:
    data_dir, output = tmp_path / "data", tmp_path / "out"
    with start(data_dir, output) as demo:
        said, complaints = demo.communicate(timeout=580)
    assert demo.returncode == 0, complaints
    assert processes_of(data_dir) == []
    report = json.loads((output / "report.json").read_text())
    assert list(report) == KEYS
    assert (report["placement"], report["adapter_kind"], report["m_kind"]) == ("paper", "calibrated", "linear")
    assert (report["rank_down"], report["rank_up"], report["m_parameters"]) == (32, 32, 30 * 32 * 3 * 32)
    assert report["answers_right_after"] >= 9
    assert report["answers_right_before"] <= 2
    assert report["loss_after"] < 0.5 < report["loss_before"]
    facts = load_facts()
    for when in ("before", "after"):
        right = sum(fact.is_right(answer[when]) for fact, answer in zip(facts, report["answers"], strict=True))
        assert right == report[f"answers_right_{when}"]
    for way in ("up", "down"):
        assert report[f"payload_bytes_{way}"] == report[f"expected_payload_bytes_{way}"] > 0
    # SmolLM2: 32 + 3 x 32 elements a token and layer instead of 576 + 576 + 192 + 192
    assert report["reduction_vs_device_lora"] == pytest.approx(1 - 128 / 1536)
    assert report["reduction_by_shape"]["llama2-7b"] == {"paper": 0.953125, "default": 0.984375}
    assert set(report["reduction_by_shape"]) == {"llama2-7b", "llama2-13b", "llama-33b"}

    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=\"https?:", page)  # it shows everything without any other file
    assert "operator&#39;s running process CAN reconstruct text" in page
    assert all(answer["after"].replace("'", "&#39;") in page for answer in report["answers"])
    assert all(f"{report[key]:,}" in page for key in ("payload_bytes_up", "payload_bytes_down", "frame_overhead_bytes"))
    for told in ("stays on this device", "crosses the wire", "operator could still reconstruct", "report.html"):
        assert told in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whatever_ends_the_demo_ends_its_service(number: signal.Signals, tmp_path: Path) -> None:
    model, data_dir = tmp_path / "model", tmp_path / "data"
    tiny_model("llama", model)
    with start(data_dir, tmp_path / "out", "--model", str(model), "--rank", "8", "--epochs", "100000") as demo:
        assert demo.stdout is not None
        while "step 1/" not in demo.stdout.readline():
            assert demo.poll() is None
        assert len(processes_of(data_dir)) == 2  # the demo and its service
        demo.send_signal(number)
        assert demo.wait(30) == 128 + number
        assert processes_of(data_dir) == []


def test_a_service_that_cannot_start_ends_the_demo_with_its_reason(tmp_path: Path) -> None:
    with start(tmp_path / "data", tmp_path / "out", "--model", str(tmp_path)) as demo:
        _, complaints = demo.communicate(timeout=60)
    assert demo.returncode == 2
    assert "has no config.json" in complaints
    assert "Traceback" not in complaints


def test_ten_facts_have_four_wordings_each_and_a_question_in_a_fifth() -> None:
    facts = load_facts()
    assert len(facts) == 10
    for fact in facts:
        assert fact.is_right(fact.answer)
        assert len({fact.question, *fact.training}) == 5
        assert not fact.is_right(fact.question)  # no question gives its answer away


def test_an_answer_is_right_with_the_whole_word_in_any_case() -> None:
    fact = Fact(answer="Space 52.", expected="52", training=[], question="")
    assert fact.is_right("it is 52.")
    assert not fact.is_right("it is 520 or 152")
    assert Fact(answer="", expected="Miso", training=[], question="").is_right("your cat is MISO!")
