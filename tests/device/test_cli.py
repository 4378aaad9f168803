"""`privatelora-device` as a device owner uses it, with a real service: every command, errors, Ctrl-C and resuming."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from tests.support.fleet import Fleet
from tests.support.service import REPOSITORY
from typer.testing import CliRunner

from privatelora.device import DeviceSession, StepRecord
from privatelora.device.cli import app
from privatelora.device.progress import FinetuneProgress, loss_curve_text, save_loss_curve
from privatelora.protocol.errors import ConfigurationError, DataError, PrivateLoraError

ROWS = [
    {"prompt": f"the word of {name} is", "completion": f" {word}"} for name, word in zip("abcd", "wxyz", strict=True)
]
PNG = b"\x89PNG\r\n\x1a\n"
MAIN = "from privatelora.device.cli import main; main()"

Run = Callable[..., Result]


@pytest.fixture
def variables(fleet: Fleet, tmp_path: Path) -> dict[str, str]:
    """The environment of one device of the tiny Llama's service, with a store of its own."""
    running = fleet.service("llama")
    return {
        "PRIVATELORA_SERVER": running.url,
        "PRIVATELORA_TOKEN": running.token,
        "PRIVATELORA_STORE_DIR": str(tmp_path / "store"),
        "PRIVATELORA_CACHE_DIR": str(fleet.folder / "cache"),
        "PRIVATELORA_PASSPHRASE": "",
        "NO_COLOR": "1",
    }


@pytest.fixture
def run(variables: dict[str, str]) -> Run:
    """Call the app as the script does; ranks fit a tiny model. An error of the tree is the result's exception."""

    def invoke(*arguments: str, text: str | None = None, rank: str = "8", **more: str) -> Result:
        rank_option = ("--rank", rank) if arguments[0] != "--help" and "--help" not in arguments else ()
        return CliRunner().invoke(app, [*arguments, *rank_option], input=text, env=variables | more)

    return invoke


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def record(step: int, total: int = 40) -> StepRecord:
    return StepRecord(
        step, total, (step - 1) // 10, 3.0 / step, 64, 321.0, 1_200_000 * step, 3_400 * step, 1e-3, 1.0, 83.0
    )


def test_every_command_explains_itself(run: Run) -> None:
    overview = run("--help")
    for command in ("finetune", "chat", "eval", "info", "export"):
        assert command in overview.output
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert "privatelora-device" in shown.output  # an example
        for panel in ("Service", "Adapter"):
            assert f"─ {panel} ─" in shown.output
        for option in (
            "--server",
            "--token",
            "--name",
            "--placement",
            "--adapter",
            "--rank",
            "--m-kind",
            "--allow-plain",
        ):
            assert option in shown.output


def test_finetune_lowers_what_eval_measures_and_the_next_command_finds_it(run: Run, data: Path, tmp_path: Path) -> None:
    before = json.loads(run("eval", str(data), "--json").stdout)
    curve = tmp_path / "loss.png"
    tuned = run("finetune", str(data), "--epochs", "30", "--learning-rate", "0.02", "--curve", str(curve))
    assert tuned.exit_code == 0, tuned.output
    assert "finished: 30 steps" in tuned.stdout
    assert "nats per labelled token" in tuned.stdout  # the curve
    assert curve.read_bytes().startswith(PNG)
    after = json.loads(run("eval", str(data), "--json").stdout)
    assert after["loss"] < 0.8 * before["loss"]
    assert (after["tokens"], after["examples"]) == (before["tokens"], before["examples"])
    assert run("eval", str(data), "--name", "another").stdout == run("eval", str(data), "--name", "third").stdout


def test_validation_and_budgets_end_a_finetune_early(run: Run, data: Path) -> None:
    many = ("finetune", str(data), "--epochs", "500")
    assert "time budget: " in run(*many, "--max-minutes", "0.005").stdout
    spent = run(*many, "--max-megabytes", "0.5", "--name", "bytes").stdout
    assert "byte budget: " in spent
    assert "--resume goes on from here" in spent
    patient = run(
        *many, "--validation", str(data), "--patience", "1", "--learning-rate", "10", "--name", "patient"
    ).stdout
    assert "early stopping: " in patient
    assert "validation by epoch: " in patient


def test_chat_answers_once_or_until_it_ends_and_streams_the_sessions_own_text(run: Run, fleet: Fleet) -> None:
    asked = [{"role": "user", "content": "what is it?"}]
    with fleet.connect(fleet.service("llama"), rank=8) as me:
        wanted = me.generate(asked, max_new_tokens=12)
        continued = me.generate("what is it?", max_new_tokens=12)
    once = run("chat", "--message", "what is it?", "--max-new-tokens", "12")
    assert once.stdout == f"{wanted}\n"
    assert run("chat", "--complete", "--message", "what is it?", "--max-new-tokens", "12").stdout == f"{continued}\n"
    talked = run("chat", "--max-new-tokens", "12", text="what is it?\n/reset\nwhat is it?\n/quit\n")
    assert talked.exit_code == 0
    assert talked.stdout.count(wanted) == 2
    assert run("chat", text="").exit_code == 0  # the end of the input


def test_a_question_that_does_not_fit_leaves_the_conversation_open(run: Run) -> None:
    talked = run("chat", "--max-new-tokens", "1", text=f"{'long ' * 200}\nshort\n/quit\n")
    assert talked.exit_code == 0
    assert "/reset forgets the conversation" in talked.stderr


def test_info_tells_what_is_held_here_and_what_crosses(run: Run) -> None:
    shown = json.loads(run("info", "--json").stdout)
    assert shown["service"]["layers"] == 6
    assert shown["adapter"]["parameters"] == 6 * 3 * 8 * 8
    assert shown["adapter"]["saved"] is False
    # float32: up h (64) and v of six layers (3 x 8), down u of six layers (8) and the last hidden state (64)
    assert shown["wire_bytes"]["generated_token"] == {"up": 4 * (64 + 6 * 24), "down": 4 * (6 * 8 + 64)}
    assert shown["round_trips_per_token"] == 7
    one_trip = json.loads(run("info", "--json", "--placement", "one-trip", "--name", "trip").stdout)
    assert one_trip["round_trips_per_token"] == 1
    assert one_trip["held_here"]["4 of 6 layers"] > 0
    text = run("info").stdout
    for part in ("Held on this device, and sent to nobody", "Crosses the wire", "operator can reconstruct text"):
        assert part in text


def test_export_writes_what_peft_reads(run: Run, data: Path, tmp_path: Path) -> None:
    run("finetune", str(data), "--epochs", "1")
    exported = run("export", str(tmp_path / "lora"))
    assert exported.exit_code == 0, exported.output
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_a_passphrase_seals_the_adapter_for_every_later_command(run: Run, data: Path) -> None:
    sealed = {"PRIVATELORA_PASSPHRASE": "correct horse"}
    assert run("finetune", str(data), "--epochs", "1", **sealed).exit_code == 0
    refused = run("info").exception
    assert isinstance(refused, PrivateLoraError)
    assert "encrypted" in refused.message
    asked = run("info", "--ask-passphrase", text="correct horse\n")
    assert asked.exit_code == 0, asked.output
    assert "correct horse" not in asked.output


def test_rows_that_are_split_are_told_in_one_line(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "word " * 200}))
    tuned = run("finetune", str(path), "--epochs", "1")
    assert tuned.exit_code == 0
    assert len(tuned.stderr.strip().splitlines()) == 1
    assert "split" in tuned.stderr


def test_ranks_are_read_as_one_number_or_two(run: Run) -> None:
    shown = json.loads(run("info", "--json", rank="16,4").stdout)
    assert (shown["adapter"]["rank_down"], shown["adapter"]["rank_up"]) == (16, 4)
    assert isinstance(run("info", rank="many").exception, ConfigurationError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "absent.jsonl"), "there is no file absent.jsonl"),
        (("info", "--token", "wrong"), "valid bearer token"),
        (("info", "--server", "http://127.0.0.1:1"), "cannot be reached"),
        (("info", "--server", "http://10.0.0.1:8765"), "--allow-plain"),
        (("finetune", "absent.jsonl", "--resume"), "absent.jsonl"),
    ],
)
def test_the_script_turns_an_error_into_one_line(
    variables: dict[str, str], arguments: tuple[str, ...], message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments, "--rank", "8"],
        cwd=REPOSITORY,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*\n", done.stderr), done.stderr
    assert message in done.stderr


def test_ctrl_c_keeps_every_finished_step_and_resume_goes_on(variables: dict[str, str], data: Path, run: Run) -> None:
    arguments = ("finetune", str(data), "--epochs", "60", "--batch-size", "2")
    with subprocess.Popen(
        [sys.executable, "-u", "-c", MAIN, *arguments, "--rank", "8"],
        cwd=REPOSITORY,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("step 1/120 ")
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(30) == 130
    stopped = re.fullmatch(r"stopped after step (\d+) of 120; .*--resume\.\n", said)
    assert stopped is not None, said
    resumed = run(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    steps = re.search(r"finished: (\d+) steps", resumed.stdout)
    assert steps is not None
    assert 120 - int(stopped[1]) - 1 <= int(steps[1]) <= 120 - int(stopped[1])  # one may have been saved but not shown


def test_without_a_terminal_progress_is_a_line_a_tenth() -> None:
    written = StringIO()
    with FinetuneProgress(Console(file=written)) as progress:
        for step in range(1, 41):
            progress(record(step))
    lines = written.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "step 1/40  epoch 1  loss 3.000  321 tokens/s  up 1.2 MB  down 3.4 kB  0:01:23 left"
    assert lines[-1].startswith("step 40/40  epoch 4 ")


def test_on_a_terminal_progress_is_a_bar_with_loss_speed_bytes_and_time_left() -> None:
    written = StringIO()
    with FinetuneProgress(Console(file=written, force_terminal=True, width=120)) as progress:
        progress(record(10))
    for part in ("10/40", "loss 0.300", "321 tokens/s", "↑ 12.0 MB", "↓ 34.0 kB", "0:01:23 left"):
        assert part in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.getvalue())


def test_a_loss_curve_is_drawn_as_text_and_as_a_png(tmp_path: Path) -> None:
    history = [record(step) for step in range(1, 41)]
    drawn = loss_curve_text(history, width=40, height=8)
    assert "nats per labelled token" in drawn
    assert len(drawn.splitlines()) >= 10
    assert save_loss_curve(history, tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert save_loss_curve(history[:1], tmp_path / "one.png").read_bytes().startswith(PNG)
    with pytest.raises(PrivateLoraError, match="cannot be written"):
        save_loss_curve(history, tmp_path / "absent" / "loss.png")
    with pytest.raises(DataError, match="took no step"):
        loss_curve_text([])


def test_progress_is_a_callback_of_a_session(fleet: Fleet) -> None:
    written = StringIO()
    with fleet.session("llama", rank=8) as me, FinetuneProgress(Console(file=written)) as progress:
        assert isinstance(me, DeviceSession)
        report = me.finetune(ROWS, epochs=2, callbacks=[progress])
    assert progress.last == report.history[-1]
    assert written.getvalue().startswith("step 1/2 ")
