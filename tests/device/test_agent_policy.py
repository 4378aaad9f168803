"""What a device's owner has written decides what runs: everything else is refused or waits, and nothing is guessed."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from privatelora.device.cli import app
from privatelora.device.jobs import evaluate, finetune_round
from privatelora.device.policy import EXAMPLE, Policy
from privatelora.protocol.errors import ConfigurationError, ProtocolError
from privatelora.protocol.jobs import MAX_REPORT_NUMBERS, JobKind, checked_params, checked_report

NOON, NIGHT, MORNING = (datetime(2026, 11, 26, *at) for at in ((12, 0), (23, 30), (5, 59)))
EVALUATE = {"loss": 1.0, "tokens": 5, "examples": 2, "of_examples": 2, "seconds": 0.1, "bytes_up": 9, "bytes_down": 9}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.toml"


def policy(path: Path, text: str) -> Policy:
    path.write_text(text)
    return Policy.read(path)


@pytest.mark.parametrize(
    ("text", "now", "on_power", "moved", "reason"),
    [
        ("", NOON, False, 10**12, None),
        ('[when]\nhours = "22:00-06:00"', NOON, True, 0, "the policy says 22:00-06:00"),
        ('[when]\nhours = "22:00-06:00"', NIGHT, True, 0, None),
        ('[when]\nhours = "22:00-06:00"', MORNING, True, 0, None),
        ('[when]\nhours = "22:00-05:59"', MORNING, True, 0, "the policy says 22:00-05:59"),
        ('[when]\nhours = "08:00-18:00"', NOON, True, 0, None),
        ('[when]\nhours = "08:00-18:00"', NIGHT, True, 0, "the policy says 08:00-18:00"),
        ("[when]\non_power = true", NOON, True, 0, None),
        ("[when]\non_power = true", NOON, False, 0, "the device is not on power"),
        ("[limits]\nmegabytes_per_day = 1.5", NOON, True, 1_499_999, None),
        ("[limits]\nmegabytes_per_day = 1.5", NOON, True, 1_500_000, "the day's 1.5 MB are spent"),
    ],
)
def test_a_job_waits_for_the_hours_the_power_and_the_bytes_of_the_policy(
    path: Path, text: str, now: datetime, on_power: bool, moved: int, reason: str | None
) -> None:
    assert policy(path, text).waits(now, on_power, moved) == reason


def test_what_is_not_allowed_or_has_no_data_is_refused(path: Path) -> None:
    data = path.with_name("notes.jsonl")
    nothing, evaluates = policy(path, ""), policy(path, '[allow.evaluate]\ndata = "notes.jsonl"')
    assert "does not allow evaluate" in (nothing.refusal("evaluate", None) or "")
    assert "does not allow finetune-round" in (evaluates.refusal("finetune-round", data) or "")
    assert "are not there" in (evaluates.refusal("evaluate", data) or "")
    data.write_text("{}")
    assert evaluates.refusal("evaluate", data) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alow = 1", "alow is no table of a policy; those are allow, when, limits"),
        ('[allow.dance]\ndata = "x"', "allow.dance is no kind of job; kinds are evaluate, finetune-round"),
        ("[allow.evaluate]", 'allow."evaluate" is {}: Object missing required field `data`'),
        ("[allow.evaluate]\ndata = 3", 'allow."evaluate".data is 3: Expected `str`'),
        ('[allow.evaluate]\ndata = "x"\nfile = "y"', "unknown field `file`"),
        ('[when]\nhours = "22-06"', "when.hours is '22-06': write it as 22:00-06:00"),
        ('[when]\nhours = "24:00-06:00"', "when.hours is '24:00-06:00'"),
        ('[when]\nhours = "06:00-06:00"', "without the line it is any time"),
        ('[when]\non_power = "yes"', "when.on_power is 'yes': Expected `bool`"),
        ("[limits]\nmegabytes_per_day = 0", "limits.megabytes_per_day is 0: Expected `float` > 0.0"),
        ("[limits]\nminutes_per_job = inf", "limits.minutes_per_job is inf"),
        ("[limits", "is not valid TOML"),
    ],
)
def test_a_bad_policy_is_told_in_one_line_with_key_value_and_reason(path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        policy(path, text)
    assert said in error.value.message
    assert error.value.message.startswith(f"policy {path}")
    assert "\n" not in error.value.message


def test_the_command_prints_a_policy_that_can_be_used_and_asks_for_one_that_is_not_there(path: Path) -> None:
    printed = CliRunner().invoke(app, ["agent", "--example-policy"])
    assert printed.stdout == EXAMPLE
    assert set(policy(path, printed.stdout).allow) == {"evaluate", "finetune-round"}
    missing = CliRunner().invoke(app, ["agent", "--policy", str(path.with_name("none.toml"))])
    assert isinstance(missing.exception, ConfigurationError)
    assert "--example-policy" in missing.exception.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "the door code is 4071"}, "loss of the report is no number"),
        ({"loss": torch.ones(())}, "loss of the report is no number"),
        ({"loss": [1.0, 2.0]}, "loss of the report is no number"),
        ({"loss": True}, "loss of the report is no number"),
        ({"loss": float("nan")}, "loss of the report is nan"),
        ({"loss": float("inf")}, "loss of the report is inf"),
        ({"loss": -1.0}, r"Expected `float` >= 0.0 - at `\$.loss`"),
        ({"tokens": 2**60}, r"at `\$.tokens`"),
        ({"secret": 4071}, "unknown field `secret`"),
        ({f"n{i}": i for i in range(MAX_REPORT_NUMBERS)}, "over the limit of 32"),
    ],
)
def test_a_report_that_holds_anything_but_its_bounded_numbers_is_refused(changes: dict[str, Any], said: str) -> None:
    assert checked_report(evaluate.KIND, EVALUATE) == EVALUATE
    with pytest.raises(ProtocolError, match=said):
        checked_report(evaluate.KIND, EVALUATE | changes)


def test_parameters_have_defaults_and_bounds(path: Path) -> None:
    assert checked_params(finetune_round.KIND, {})["epochs"] == 1
    for params in ({"epochs": 101}, {"epochs": "1"}, {"data": "/etc/passwd"}, {"learning_rate": 0}):
        with pytest.raises(ConfigurationError, match="parameters of finetune-round are not valid"):
            checked_params(finetune_round.KIND, params)


def test_a_kind_must_forbid_what_it_does_not_know() -> None:
    class Loose(msgspec.Struct):
        loss: float = 0.0

    with pytest.raises(ValueError, match="must forbid unknown fields"):
        JobKind("loose", evaluate.Params, Loose)
