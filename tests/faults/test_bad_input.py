"""What people and programs get wrong: every mistake is an exception of the one tree that says what to do next.

And a session that refused something is as good as before: its adapter has not moved, and its next result is the same.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from flwr.common import ConfigRecord
from tests.support.fleet import Fleet

from privatelora.cloud.backbone import Backbone
from privatelora.device import DeviceSession, Example
from privatelora.device.state import IDENTITY
from privatelora.device.store import write_state
from privatelora.protocol.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectionLostError,
    DataError,
    IncompatibleError,
    PrivateLoraError,
    StoreError,
)
from privatelora.protocol.messages import BLOB_PATH, INFO_PATH
from privatelora.protocol.placement import Placement

NAN, INFINITY = math.nan, math.inf
ROWS = ["the quick brown fox", "jumps over the lazy dog"]


@pytest.fixture(scope="module")
def me(fleet: Fleet) -> Iterator[DeviceSession]:
    with fleet.session("llama", placement="first=1,inline=2+3", rank=8) as session:
        yield session


@pytest.fixture
def unharmed(me: DeviceSession) -> Iterator[None]:
    """The session computes the same after the test as before it, and its adapter has not moved."""
    before = observe(me)
    yield
    assert all(torch.equal(a, b) for a, b in zip(before, observe(me), strict=True))


def observe(me: DeviceSession) -> list[torch.Tensor]:
    values = [parameter.detach().clone() for parameter in me.adapter.parameters()]
    loss = me.forward_backward(me.examples(ROWS).examples).loss
    gradients = [parameter.grad for parameter in me.adapter.parameters() if parameter.grad is not None]
    me.optimizer.zero_grad()
    assert len(gradients) == len(values)
    return [torch.tensor(loss), *values, *gradients]


def refused(kind: type[PrivateLoraError], word: str) -> Any:
    """`pytest.raises` for exactly this class of the tree, with a word of its advice."""
    return pytest.raises(kind, match=word, check=lambda error: type(error) is kind)


# -- servers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "server", ["", "localhost:8765", "ftp://localhost", "http://", "http://[::1", "http://localhost:port", "8765"]
)
def test_a_server_that_is_no_url_is_refused(server: str) -> None:
    with refused(ConfigurationError, "https://host:port"):
        DeviceSession(server, token="token")


def test_a_server_that_is_not_there_is_named_with_how_to_start_one() -> None:
    with refused(ConnectionLostError, r"127\.0\.0\.1:1 .*privatelora up"):
        DeviceSession("http://127.0.0.1:1", token="token")


@pytest.mark.parametrize("server", ["http://192.0.2.1:8765", "http://service.example", "http://localhost.example"])
def test_a_plain_connection_to_another_host_is_refused(server: str) -> None:
    with refused(ConfigurationError, "https://.*allow_plain"):
        DeviceSession(server, token="token")


def test_a_plain_connection_that_was_asked_for_is_tried() -> None:
    with refused(ConnectionLostError, "cannot be reached"):
        DeviceSession("http://192.0.2.1:1", token="token", allow_plain=True, timeout_s=0.2)


@contextmanager
def other_server(body: bytes, status: int = 200, blob: bytes = b"", announced: int | None = None) -> Iterator[str]:
    """An HTTP server that answers everything with one body, and downloads with `blob`, of which it says its length."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = blob if BLOB_PATH in self.path else body
            length = announced if announced is not None and BLOB_PATH in self.path else len(content)
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("body", [b"<html>It works!</html>", b"", b"{}", b'{"protocol_version": "one"}'])
def test_another_kind_of_server_is_recognised(body: bytes) -> None:
    with other_server(body) as url, refused(IncompatibleError, "does not announce a PrivateLoRA service"):
        DeviceSession(url, token="token")


def test_a_wrong_path_is_recognised() -> None:
    with other_server(b"not found", 404) as url, refused(ConnectionLostError, "404; is the URL right"):
        DeviceSession(url, token="token")


def test_another_protocol_version_is_refused(fleet: Fleet) -> None:
    running = fleet.service("llama")
    answer = httpx2.get(running.url + INFO_PATH, headers={"Authorization": f"Bearer {running.token}"})
    announced = answer.json() | {"protocol_version": 2}
    with other_server(json.dumps(announced).encode()) as url, refused(IncompatibleError, "install the same release"):
        DeviceSession(url, token="token")


@pytest.mark.parametrize(
    ("blob", "length", "word"),
    [(b"damaged", None, "arrived damaged; try again"), (b"half", 10_000, "broke off.*try again")],
)
def test_a_download_that_is_not_whole_is_not_kept(
    fleet: Fleet, tmp_path: Path, blob: bytes, length: int | None, word: str
) -> None:
    running = fleet.service("llama")
    answer = httpx2.get(running.url + INFO_PATH, headers={"Authorization": f"Bearer {running.token}"})
    places = {"cache_dir": tmp_path / "cache", "store_dir": tmp_path / "store"}
    with other_server(answer.content, blob=blob, announced=length) as url, refused(ConnectionLostError, word):
        DeviceSession(url, token="token", rank=8, **places)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    with DeviceSession(running.url, token=running.token, rank=8, **places) as session:  # the store is free again
        assert session.generate("hello", max_new_tokens=2)


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_refused(fleet: Fleet) -> None:
    with refused(AuthenticationError, "PRIVATELORA_TOKEN"):
        DeviceSession(fleet.service("llama").url, token="wrong")


@pytest.mark.parametrize("token", ["gehëim", "two\nlines", "null\0"])
def test_a_token_that_cannot_be_one_is_refused(fleet: Fleet, token: str) -> None:
    with refused(AuthenticationError, "copy it again"):
        DeviceSession(fleet.service("llama").url, token=token)


def test_a_missing_token_is_asked_for(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PRIVATELORA_TOKEN", raising=False)
    monkeypatch.setenv("PRIVATELORA_DATA_DIR", str(tmp_path))  # no embedded service's token lies here
    with refused(AuthenticationError, "pass token=, or set PRIVATELORA_TOKEN"):
        DeviceSession(fleet.service("llama").url)


def test_the_local_token_is_not_shown_to_other_hosts(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRIVATELORA_TOKEN", raising=False)
    monkeypatch.setenv("PRIVATELORA_DATA_DIR", str(fleet.data_dir("llama")))
    with refused(AuthenticationError, "needs a token"):
        DeviceSession("https://192.0.2.1", timeout_s=0.2)


# -- settings of a session --------------------------------------------------------------------------------------------

BAD_SETTINGS: list[tuple[dict[str, Any], type[PrivateLoraError], str]] = [
    ({"rank": 1000}, ConfigurationError, "up to 64"),
    ({"rank": 0}, ConfigurationError, "1 or more"),
    ({"rank": (8, -1)}, ConfigurationError, "1 or more"),
    ({"adapter": "svd"}, ConfigurationError, "calibrated, random"),
    ({"m_kind": "conv"}, ConfigurationError, "linear, mlp"),
    ({"m_kind": "mlp", "m_hidden": 0}, ConfigurationError, "1 or more"),
    ({"lora_rank": 0}, ConfigurationError, "1 or more"),
    ({"lora_alpha": 0.0}, ConfigurationError, "above 0"),
    ({"lora_alpha": NAN}, ConfigurationError, "above 0"),
    ({"placement": "two-trips"}, ConfigurationError, "paper, few-trips, one-trip"),
    ({"placement": "first=3,last=3"}, ConfigurationError, "less than 6"),
    ({"placement": Placement(inline=(9,))}, ConfigurationError, r"0\.\.5"),
    ({"wire_dtype": "float8"}, ConfigurationError, "float32, bfloat16, float16 or int8"),
    ({"name": "../mine"}, StoreError, "use letters"),
    ({"store_dir": "/proc/none"}, StoreError, "PRIVATELORA_STORE_DIR"),
    ({"cache_dir": "/proc/none"}, StoreError, "PRIVATELORA_CACHE_DIR"),
    ({"passphrase": ""}, StoreError, "empty"),
]


@pytest.mark.parametrize(("changes", "kind", "word"), BAD_SETTINGS, ids=lambda value: str(value)[:40])
def test_bad_settings_are_refused(
    fleet: Fleet, changes: dict[str, Any], kind: type[PrivateLoraError], word: str
) -> None:
    settings = {"placement": "first=1,inline=2+3", "rank": 8} | changes
    with refused(kind, word):
        fleet.connect(fleet.service("llama"), **settings)


def test_a_file_of_authorities_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("not a certificate")
    for path in (tmp_path / "ca.pem", tmp_path / "nothing.pem"):
        with refused(ConfigurationError, "give a PEM file"):
            DeviceSession("https://127.0.0.1:1", token="token", ca_file=path)


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with refused(ConfigurationError, r"no-such-model"):
        Backbone.load("no-such-model", tmp_path)


# -- adapters of something else ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an adapter for llama, every layer inline, rank 8."""
    directory = tmp_path_factory.mktemp("saved")
    with fleet.session("llama", placement="paper", rank=8, store_dir=directory) as session:
        session.checkpoint()
    return directory


def test_a_saved_adapter_is_found_with_its_settings(fleet: Fleet, saved: Path) -> None:
    with fleet.session("llama", store_dir=saved) as session:
        assert (session.placement.round_trips, session.settings.spec.rank_down) == (7, 8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"placement": "one-trip"}, "placement"),
        ({"rank": 16}, "settings"),
        ({"m_kind": "mlp"}, "settings"),
        ({"adapter": "random"}, "set_hash"),
        ({"lora_rank": 4}, "settings"),
    ],
)
def test_an_adapter_saved_with_other_settings_is_refused(
    fleet: Fleet, saved: Path, changes: dict[str, Any], named: str
) -> None:
    with refused(IncompatibleError, f"{named}: saved .*name="):
        fleet.session("llama", store_dir=saved, **changes)


def test_an_adapter_of_another_model_is_refused(fleet: Fleet, saved: Path) -> None:
    with refused(IncompatibleError, "connect to the other service"):
        fleet.session("qwen3", store_dir=saved)


def test_an_adapter_of_a_set_that_is_not_published_is_refused(fleet: Fleet, saved: Path, tmp_path: Path) -> None:
    with fleet.session("llama", store_dir=saved) as session:
        state = session.state()
    identity = json.loads(str(state.config_records[IDENTITY]["json"])) | {"set_hash": "0" * 64}
    state.config_records[IDENTITY] = ConfigRecord({"json": json.dumps(identity)})
    write_state(tmp_path / "default.adapter", state)
    with refused(IncompatibleError, "ask its operator to import it"):
        fleet.session("llama", store_dir=tmp_path)


@pytest.mark.usefixtures("unharmed")
def test_a_file_of_another_adapter_is_refused(me: DeviceSession, saved: Path, tmp_path: Path) -> None:
    with refused(IncompatibleError, "placement: saved"):
        me.load(saved / "default.adapter")
    (tmp_path / "notes.txt").write_text("not an adapter")
    with refused(StoreError, "not a saved adapter"):
        me.load(tmp_path / "notes.txt")
    with refused(StoreError, "check the path"):
        me.load(tmp_path / "nothing")
    with refused(StoreError, "cannot be written"):
        me.save(tmp_path / "no" / "such" / "folder")


# -- data -------------------------------------------------------------------------------------------------------------


def bad_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


BAD_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: [], "at least one"),
    "an empty row": (lambda folder: [""], "leave the row out"),
    "a file that is not there": (lambda folder: folder / "none.jsonl", "none.jsonl"),
    "a folder": (lambda folder: folder, "folder|directory"),
    "an unknown kind of file": (bad_file("data.docx", b"PK"), "jsonl"),
    "an empty file": (bad_file("data.jsonl", b""), "at least one"),
    "a line that is no JSON": (bad_file("data.jsonl", b'{"text": "a"}\n{"text"\n'), "line 2"),
    "bytes that are no UTF-8": (bad_file("data.jsonl", b'{"text": "\xff"}\n'), "UTF-8"),
    "a table without the columns": (bad_file("data.csv", b"a,b\n1,2\n"), "columns"),
    "bytes that are no table": (bad_file("data.parquet", b"PAR1 not really"), "Parquet|parquet"),
    "two shapes in one": (lambda folder: ["text", {"prompt": "a", "completion": "b"}], "row 2"),
    "a number": (lambda folder: [3], "row 1"),
    "None": (lambda folder: None, "list"),
}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("make", "word"), BAD_DATA.values(), ids=list(BAD_DATA))
def test_bad_data_is_refused(me: DeviceSession, tmp_path: Path, make: Callable[[Path], object], word: str) -> None:
    data: Any = make(tmp_path)
    for verb in (me.finetune, me.evaluate):
        with refused(DataError, word):
            verb(data)
    if data is not None:
        with refused(DataError, word):
            me.finetune(ROWS, validation=data)


# -- fine-tuning ------------------------------------------------------------------------------------------------------

BAD_RECIPES: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 0}, "1 or more"),
    ({"epochs": -1}, "1 or more"),
    ({"epochs": 1.5}, "type int"),
    ({"epochs": "3"}, "type int"),
    ({"batch_size": 0}, "1 or more"),
    ({"batch_size": True}, "type int"),
    ({"learning_rate": 0.0}, "above 0"),
    ({"learning_rate": -1e-3}, "above 0"),
    ({"learning_rate": NAN}, "finite"),
    ({"learning_rate": INFINITY}, "finite"),
    ({"learning_rate": "1e-3"}, "type float"),
    ({"clip_norm": 0.0}, "above 0"),
    ({"clip_norm": NAN}, "above 0"),
    ({"warmup_steps": -1}, "0 or more"),
    ({"patience": 1}, "pass validation="),
    ({"patience": -1, "validation": ROWS}, "0 or more"),
    ({"max_seconds": -1.0}, "0 or more"),
    ({"max_seconds": NAN}, "0 or more"),
    ({"max_bytes": -1}, "0 or more"),
    ({"max_bytes": 1.5}, "type int"),
    ({"seed": -1}, "0 or more"),
]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("changes", "word"), BAD_RECIPES, ids=lambda value: str(value))
def test_a_bad_recipe_is_refused_before_anything_moves(me: DeviceSession, changes: dict[str, Any], word: str) -> None:
    before = dict(me.progress)
    with refused(ConfigurationError, word):
        me.finetune(ROWS, **changes)
    assert me.progress == before


@pytest.mark.usefixtures("unharmed")
def test_a_batch_beyond_the_services_step_is_refused(me: DeviceSession) -> None:
    tokens = np.arange(500, dtype=np.int64) % 200
    example = Example(tokens, np.append(tokens[1:], -100))
    with refused(ConfigurationError, "smaller batch_size"):
        me.forward_backward([example] * 17)  # 8500 tokens of 8192
    with refused(DataError, "one example or more"):
        me.forward_backward([])


def test_a_placement_that_trains_nothing_says_so(fleet: Fleet) -> None:
    with (
        fleet.session("llama", placement="first=2,train_first=no") as session,
        refused(ConfigurationError, "choose one with"),
    ):
        session.finetune(ROWS)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("rate", [NAN, INFINITY, -1.0])
def test_a_step_of_no_size_is_refused(me: DeviceSession, rate: float) -> None:
    with refused(ConfigurationError, "finite"):
        me.optim_step(rate)


def test_a_gradient_that_is_not_finite_is_not_taken(me: DeviceSession) -> None:
    before = observe(me)
    me.forward_backward(me.examples(ROWS).examples)
    gradient = next(p.grad for p in me.adapter.parameters() if p.grad is not None)
    gradient[..., 0] = NAN
    with refused(DataError, "lower the learning rate"):
        me.optim_step(1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, observe(me), strict=True))


# -- losses -----------------------------------------------------------------------------------------------------------


class OwnError(Exception):
    """Of the caller's own code."""


def raises(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    raise OwnError("my mistake")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("verb", ["forward_backward", "finetune"])
def test_a_loss_that_raises_raises_as_it_is(me: DeviceSession, verb: str) -> None:
    data: Any = me.examples(ROWS).examples if verb == "forward_backward" else ROWS
    with pytest.raises(OwnError, match="my mistake"):
        getattr(me, verb)(data, loss_fn=raises)


BAD_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "one number a token": lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
    "a float": lambda logits, labels: 1.0,
    "None": lambda logits, labels: None,
    "a constant": lambda logits, labels: torch.tensor(1.0),
    "detached": lambda logits, labels: logits.sum().detach(),
}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("loss_fn", BAD_LOSSES.values(), ids=list(BAD_LOSSES))
def test_a_loss_that_is_no_scalar_of_the_logits_is_refused(me: DeviceSession, loss_fn: Callable[..., Any]) -> None:
    with refused(ConfigurationError, "scalar"):
        me.forward_backward(me.examples(ROWS).examples, loss_fn)


@pytest.mark.usefixtures("unharmed")
def test_a_loss_that_is_not_a_number_says_so(me: DeviceSession) -> None:
    with pytest.raises(PrivateLoraError, match="lower the learning rate"):
        me.forward_backward(me.examples(ROWS).examples, lambda logits, labels: logits.sum() * NAN)


# -- prompts ----------------------------------------------------------------------------------------------------------

BAD_PROMPTS: list[tuple[dict[str, Any], type[PrivateLoraError], str]] = [
    ({"prompt": ""}, DataError, "at least one word"),
    ({"prompt": []}, DataError, "at least one word"),
    ({"prompt": "x" * 512}, DataError, "shorten"),
    ({"prompt": [{"role": "user"}]}, DataError, "lacks content"),
    ({"prompt": [{"content": "hello"}]}, DataError, "lacks role"),
    ({"prompt": ["hello"]}, DataError, "role"),
    ({"prompt": [{"role": "user", "content": 3}]}, DataError, "content"),
    ({"temperature": -0.5}, ConfigurationError, "0 or more"),
    ({"temperature": NAN}, ConfigurationError, "0 or more"),
    ({"top_p": 0.0}, ConfigurationError, r"\(0, 1\]"),
    ({"top_p": 1.1}, ConfigurationError, r"\(0, 1\]"),
    ({"max_new_tokens": 0}, ConfigurationError, "1 or more"),
    ({"max_new_tokens": -3}, ConfigurationError, "1 or more"),
    ({"stop": [""]}, ConfigurationError, "empty"),
    ({"stop": ""}, ConfigurationError, "empty"),
]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("changes", "kind", "word"), BAD_PROMPTS, ids=lambda value: str(value)[:40])
def test_a_bad_prompt_or_setting_is_refused_at_once(
    me: DeviceSession, changes: dict[str, Any], kind: type[PrivateLoraError], word: str
) -> None:
    asked: dict[str, Any] = {"prompt": "hello", "max_new_tokens": 2} | changes
    with refused(kind, word):
        me.generate(**asked)
    with refused(kind, word):
        me.stream(**asked)  # not only when its first piece is asked for


@pytest.mark.usefixtures("unharmed")
def test_evaluation_in_batches_of_none_is_refused(me: DeviceSession) -> None:
    with refused(ConfigurationError, "1 or more"):
        me.evaluate(ROWS, batch_size=0)
