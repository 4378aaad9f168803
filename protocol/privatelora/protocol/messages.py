"""What is said in JSON: the announcement at `GET /v1/info`, and the control messages OPEN, QUEUED, OPENED and ERROR.

msgspec structs, so that both ends check types and bounds by the same declaration; `parse` turns a failed check into a
`ProtocolError` that names the field.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from privatelora.protocol.adapter import AdapterSpec, ModelShape
from privatelora.protocol.errors import PrivateLoraError, ProtocolError, error_from_code
from privatelora.protocol.frames import VERSION, Frame, Kind
from privatelora.protocol.placement import Placement

INFO_PATH = "/v1/info"
DATA_PLANE_PATH = "/v1/sessions"
BLOB_PATH = "/v1/blobs"  # + /{sha256}: model parts, tokenizer files and adapter sets, all named by content

Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Installation = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """A downloadable file, named by its content."""

    sha256: Hash
    nbytes: Annotated[int, msgspec.Meta(ge=0)]


class SetInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A published set of A and B: for every layer `A` (E, r, d) and B `q`, `k`, `v` (r, d_p)."""

    sha256: Hash
    nbytes: int
    kind: str
    model_hash: Hash
    max_rank_down: int
    max_rank_up: int


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The frozen model: its shape, and its parts by name (`embedding`, `final`, `layer.0` .., tokenizer files)."""

    name: str
    sha256: Hash
    dtype: str
    shape: ModelShape
    context_length: int
    parts: dict[str, Blob]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one session may ask for."""

    max_tokens_per_step: int
    max_sequences: int
    max_streams: int
    max_message_bytes: int
    idle_timeout_s: float


class ServiceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a service announces at its base URL."""

    protocol_version: int
    data_plane: str  # path of the sessions' WebSocket, or its http(s) URL where another process serves it
    model: ModelInfo
    sets: list[SetInfo]
    default_sets: dict[str, Hash]  # adapter kind -> the set that new sessions of that kind use
    placements: list[str]  # what `Placement.parse` reads; "custom" allows any that fits the model
    default_placement: str
    limits: Limits
    blobs: str = BLOB_PATH  # path of the downloads, or their URL as above


class OpenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """OPEN: which model, set, ranks, placement and element type this session will use."""

    protocol_version: int = VERSION
    model_hash: Hash
    set_hash: Hash | None
    spec: AdapterSpec
    placement: Placement
    wire_dtype: str
    device: Installation | None = None  # the random number of this installation, by which a control plane knows it


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """OPENED: the session exists; every later frame carries its id."""

    session: Annotated[int, msgspec.Meta(ge=1)]


class Queued(msgspec.Struct, frozen=True, kw_only=True):
    """QUEUED: there is no room yet for this session, or for the pass that it began; nothing is to be done but wait."""

    place: Annotated[int, msgspec.Meta(ge=1)]  # 1 is next
    waiting: Annotated[int, msgspec.Meta(ge=1)]  # how many wait, this one among them


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """ERROR, and the body of a refused HTTP request: a code of the error tree, and what to do next."""

    code: str
    message: str
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: PrivateLoraError) -> ErrorInfo:
        return cls(code=error.code, message=error.message, retry_after_s=error.retry_after_s)

    def to_error(self) -> PrivateLoraError:
        return error_from_code(self.code, self.message, self.retry_after_s)


Message = TypeVar("Message", bound=msgspec.Struct)


def parse(data: bytes | memoryview, kind: type[Message]) -> Message:
    """Read a JSON message; raises `ProtocolError` naming the field, or the setting that a field's own check refused."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the {kind.__name__} message is not valid: {error}") from None


def control_frame(kind: Kind, message: msgspec.Struct, session: int = 0) -> Frame:
    """A control frame that carries `message` as JSON."""
    payload = msgspec.json.encode(message)
    return Frame(kind, session, shape=(len(payload),), payload=payload)
