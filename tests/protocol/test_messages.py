"""Control messages: JSON in, checked structures out, and nothing but errors of the tree for anything else."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privatelora.protocol.adapter import AdapterSpec
from privatelora.protocol.errors import (
    AdmissionError,
    ConfigurationError,
    PrivateLoraError,
    ProtocolError,
    ServiceError,
    error_from_code,
)
from privatelora.protocol.frames import Frame, Kind
from privatelora.protocol.messages import ErrorInfo, Opened, OpenRequest, Queued, ServiceInfo, control_frame, parse
from privatelora.protocol.placement import Placement

KINDS = [OpenRequest, Opened, Queued, ErrorInfo, ServiceInfo]
REQUEST = OpenRequest(
    model_hash="a" * 64,
    set_hash="b" * 64,
    spec=AdapterSpec("random", 3, 5),
    placement=Placement(1, 2, (4, 5), False),
    wire_dtype="float32",
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    "message",
    [REQUEST, Opened(session=7), Queued(place=3, waiting=5), ErrorInfo(code="data", message="m", retry_after_s=2.0)],
)
def test_a_message_survives_the_way_there(message: msgspec.Struct) -> None:
    came = Frame.unpack(control_frame(Kind.OPEN, message, session=3).pack())
    assert came.session == 3
    assert came.payload_bytes == 0  # control messages are overhead, never payload
    assert parse(came.payload, type(message)) == message


@pytest.mark.parametrize("kind", KINDS)
@given(value=json_values)
def test_any_json_that_is_not_the_message_is_refused(kind: type[msgspec.Struct], value: Any) -> None:
    with pytest.raises(ProtocolError, match=kind.__name__):
        parse(json.dumps(value).encode(), kind)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.binary(max_size=64))
def test_bytes_that_are_no_json_are_refused(kind: type[msgspec.Struct], data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not valid"):
        parse(data, kind)


def test_json_deeper_than_the_stack_is_refused() -> None:
    with pytest.raises(ProtocolError):
        parse(b'{"code":' + b"[" * 100_000, ErrorInfo)


@given(field=st.sampled_from(sorted(msgspec.to_builtins(REQUEST))), value=json_values)
def test_an_open_request_with_one_field_changed_raises_errors_of_the_tree_only(field: str, value: Any) -> None:
    changed = msgspec.to_builtins(REQUEST) | {field: value}
    try:
        request = parse(json.dumps(changed).encode(), OpenRequest)
    except PrivateLoraError as error:
        assert isinstance(error, (ProtocolError, ConfigurationError))
    else:
        assert getattr(request, field) is not None or field in ("set_hash", "device")


WRONG_FIELDS = [
    ("model_hash", "A" * 64, "model_hash"),
    ("model_hash", "../" * 21 + "a", "model_hash"),
    ("set_hash", "b" * 63, "set_hash"),
    ("spec", {"kind": "svd"}, "svd"),
    ("spec", {"rank_down": 0}, "ranks must be 1 or more"),
    ("spec", {"rank_up": "8"}, "rank_up"),
    ("placement", {"inline": [1.5]}, "inline"),
    ("wire_dtype", None, "wire_dtype"),
    ("device", "laptop", "device"),
]


@pytest.mark.parametrize(("field", "value", "named"), WRONG_FIELDS)
def test_a_refusal_names_the_field(field: str, value: Any, named: str) -> None:
    changed = msgspec.to_builtins(REQUEST) | {field: value}
    with pytest.raises((ProtocolError, ConfigurationError), match=named):
        parse(json.dumps(changed).encode(), OpenRequest)


def all_errors(root: type[PrivateLoraError]) -> list[type[PrivateLoraError]]:
    """Those that either end raises over the wire; the control plane's and the agent's own have another way."""
    found = [one for cls in root.__subclasses__() for one in (cls, *all_errors(cls))]
    return [cls for cls in found if cls.__module__ == root.__module__]


@pytest.mark.parametrize("cls", all_errors(PrivateLoraError), ids=lambda cls: cls.__name__)
def test_every_error_of_the_tree_crosses_the_wire_as_itself(cls: type[PrivateLoraError]) -> None:
    came = parse(msgspec.json.encode(ErrorInfo.of(cls("what happened", retry_after_s=1.5))), ErrorInfo).to_error()
    assert type(came) is cls
    assert (str(came), came.message, came.retry_after_s) == ("what happened", "what happened", 1.5)


def test_an_error_without_a_retry_time_has_none() -> None:
    assert ErrorInfo.of(AdmissionError("full")).to_error().retry_after_s is None


@given(st.text(max_size=12).filter(lambda code: code not in {cls.code for cls in all_errors(PrivateLoraError)}))
def test_a_code_of_a_newer_service_is_still_an_error_of_the_tree(code: str) -> None:
    error = error_from_code(code, "what happened")
    assert type(error) is ServiceError
    assert "what happened" in str(error)
    assert "newer" in str(error)
