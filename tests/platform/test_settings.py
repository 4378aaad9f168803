"""Settings of a service: one typed place, where each value says where it came from and each error what to change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from privatelora.platform.models import source_of
from privatelora.platform.settings import Settings, load_settings, origins, unknown_variables
from privatelora.protocol.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PRIVATELORA_")]:
        monkeypatch.delenv(name)


def test_options_win_over_variables_and_variables_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVATELORA_PORT", "9000")
    monkeypatch.setenv("PRIVATELORA_MAX_SESSIONS", "7")
    options = {"port": 9001, "host": None}  # an option that was not given is None
    settings = load_settings(options)
    assert (settings.port, settings.max_sessions, settings.host) == (9001, 7, "127.0.0.1")
    source = {one.name: one.source for one in origins(settings, options)}
    assert source["port"] == "option --port"
    assert source["max_sessions"] == "environment PRIVATELORA_MAX_SESSIONS"
    assert source["host"] == "default"
    assert set(source) == set(Settings.model_fields)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("PRIVATELORA_PORT", "http", "valid integer"),
        ("PRIVATELORA_PORT", "70000", "65535"),
        ("PRIVATELORA_DTYPE", "int4", "'bfloat16'"),
        ("PRIVATELORA_DEVICE", "gpu", "use cpu"),
        ("PRIVATELORA_IDLE_TIMEOUT_S", "0", "greater than 0"),
        ("PRIVATELORA_TORCH_THREADS", "0", "greater than or equal to 1"),
        ("PRIVATELORA_DEFAULT_PLACEMENT", "papers", "use one of paper"),
        ("PRIVATELORA_PLACEMENTS", "paper first=x", "cannot be read"),
    ],
)
def test_a_bad_value_gives_one_line_that_says_which_and_why(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as raised:
        load_settings()
    message = raised.value.message
    assert message.startswith(f"{variable}={value}: ")
    assert reason in message
    assert "\n" not in message


def test_a_bad_option_is_named_as_it_was_typed() -> None:
    with pytest.raises(ConfigurationError, match=r"^--max-sessions=0: "):
        load_settings({"max_sessions": 0})


def test_every_bad_value_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVATELORA_PORT", "x")
    with pytest.raises(ConfigurationError) as raised:
        load_settings({"dtype": "int4"})
    assert "PRIVATELORA_PORT=x" in raised.value.message
    assert "--dtype=int4" in raised.value.message


def test_placements_are_read_from_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVATELORA_PLACEMENTS", "paper,one-trip first=2,last=4,inline=7+12;few-trips")
    assert load_settings().placements == ("paper", "one-trip", "first=2,last=4,inline=7+12", "few-trips")


def test_a_default_placement_that_is_not_offered_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="default_placement paper is not among the placements one-trip"):
        load_settings({"placements": "one-trip"})
    assert load_settings({"placements": "one-trip", "default_placement": "one-trip"}).placements == ("one-trip",)


def test_tls_needs_both_of_its_files(tmp_path: Path) -> None:
    pem = tmp_path / "pem"
    pem.touch()
    with pytest.raises(ConfigurationError, match="certfile is set without keyfile"):
        load_settings({"certfile": pem})
    with pytest.raises(ConfigurationError, match=r"keyfile .*absent does not exist"):
        load_settings({"certfile": pem, "keyfile": tmp_path / "absent"})
    assert load_settings({"certfile": pem, "keyfile": pem}).certfile == pem


def test_a_misspelt_variable_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PRIVATELORA_PROT", "PRIVATELORA_PORT", "PRIVATELORA_TOKEN"):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == ["PRIVATELORA_PROT"]


def test_smollm2_is_the_bundled_file_and_other_names_stay_as_they_are() -> None:
    assert Path(source_of("smollm2")).suffix == ".gguf"
    assert source_of("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert source_of("~/model") == str(Path.home() / "model")
