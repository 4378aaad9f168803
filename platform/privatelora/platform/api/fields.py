"""Types of fields that resources share: ids, names, times, numbers; each refuses what no database can hold."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from privatelora.platform.tables import NAME_CHARS

# neither control characters, nor those that break lines or turn the direction of a text
PLAIN = r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]*$"
ULID = "[0-7][0-9A-HJKMNP-TV-Z]{25}"
LARGEST = 2**63 - 1  # of the database's integers
SMALLEST_INT, LARGEST_INT = -(2**31), 2**31 - 1
FIRST_YEAR, LAST_YEAR = 2000, 2199
JSON_CHARS, JSON_DEPTH = 16_384, 20  # of an object that is kept as it came


def _text_only(value: Any) -> Any:
    if not isinstance(value, str | datetime):
        raise ValueError("is not a time; write it as RFC 3339 has it, such as 2026-11-26T02:00:00Z")
    return value


def _in_range(value: datetime) -> datetime:
    if not FIRST_YEAR <= value.year <= LAST_YEAR:
        raise ValueError(f"is not between the years {FIRST_YEAR} and {LAST_YEAR}")
    return value.astimezone(UTC)


def _storable(value: dict[str, Any]) -> dict[str, Any]:
    """What can be kept and shown again: an object that cannot would break every list that it is in."""
    if _depth(value) > JSON_DEPTH:
        raise ValueError(f"has more than {JSON_DEPTH} levels")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError:  # UnicodeEncodeError is one
        raise ValueError("has a number that is not finite, or text that is not Unicode") from None
    if len(text) > JSON_CHARS:
        raise ValueError(f"is longer than {JSON_CHARS} characters")
    if "\\u0000" in text:
        raise ValueError("has a NUL character in it")
    return value


def _depth(value: Any, most: int = JSON_DEPTH + 1) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if parts is None or most == 0:
        return 0
    return 1 + max((_depth(part, most - 1) for part in parts), default=0)


class Strict(BaseModel):
    """A request's body: what it does not know, it refuses."""

    model_config = ConfigDict(extra="forbid")


class Shown(BaseModel):
    """An object as it is shown, read from a table's row."""

    model_config = ConfigDict(from_attributes=True)


def id_type(prefix: str) -> Any:
    """Ids of one kind: their prefix and a ULID."""
    example = f"{prefix}_01JDMV5Z3T8Q6W9E2R4Y7H1K0N"
    return Annotated[str, StringConstraints(pattern=f"^{prefix}_{ULID}$"), Field(examples=[example])]


UserId = id_type("usr")
KeyId = id_type("key")
DeviceId = id_type("dev")
BackboneId = id_type("bbn")
SessionId = id_type("ses")
QuotaId = id_type("quo")
JobId = id_type("job")
ScheduleId = id_type("sch")
AuditId = id_type("aud")
AnyId = Annotated[str, StringConstraints(pattern=rf"^([a-z]{{3}}_{ULID}|[0-9a-f]{{64}})$")]

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$"), Field(examples=["5f" * 32])]
Name = Annotated[str, StringConstraints(min_length=1, max_length=NAME_CHARS, pattern=PLAIN)]
When = Annotated[
    AwareDatetime,
    BeforeValidator(_text_only),
    AfterValidator(_in_range),
    Field(examples=["2026-11-26T02:00:00Z"]),
]
JsonObject = Annotated[dict[str, Any], AfterValidator(_storable)]
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Whole = Annotated[int, Field(strict=True, ge=SMALLEST_INT, le=LARGEST_INT)]
Flag = Annotated[bool, Field(strict=True)]
