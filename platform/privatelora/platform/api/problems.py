"""Errors as the REST API tells them: RFC 9457 problem details, `application/problem+json`.

    any exception -> `refusal_of` -> a `Refusal` with status, title and headers -> `render` -> the response

Routes raise a `Refusal`, or an error of privatelora's tree; what else may come out of a library has its place in
`refusal_of`. `/v1/info` alone answers in the devices' own words, `ErrorInfo`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import structlog
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from sqlalchemy.exc import DataError as ValueRefused
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm.exc import StaleDataError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from privatelora.platform.jobs.machine import JobConflictError, NoSuchJobError
from privatelora.platform.limits import TooManyError
from privatelora.protocol.errors import (
    AdmissionError,
    AuthenticationError,
    ConfigurationError,
    DataError,
    PrivateLoraError,
    ProtocolError,
)
from privatelora.protocol.messages import ErrorInfo

MEDIA_TYPE = "application/problem+json"
AWAY_S = 2.0  # until what is away is asked for again
SHOWN_CHARS = 200  # of anything that a client sent and is told back

log = structlog.get_logger("privatelora.api")


class FieldProblem(BaseModel):
    """One thing that is wrong with a request."""

    field: str = Field(description="Where it is, such as `body.name` or `query.limit`.", examples=["body.name"])
    reason: str = Field(description="What is wrong with it.", examples=["String should have at most 120 characters"])


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="Kind of problem, the same for every one like it.")
    title: str = Field(description="The kind in words.")
    status: int = Field(ge=400, le=599, description="The HTTP status.")
    detail: str = Field(description="What happened, and what to do next.")
    errors: list[FieldProblem] | None = Field(default=None, description="With 422: each field that is wrong.")


class Refusal(PrivateLoraError):
    """A request that is answered with a problem."""

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        errors: Sequence[tuple[str, str]] = (),
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.errors = errors
        self.headers = headers or {}


class Unauthenticated(Refusal):
    code, status, title = AuthenticationError.code, 401, "Authentication needed"


class Forbidden(Refusal):
    code, status, title = "forbidden", 403, "Not allowed"


class NotFound(Refusal):
    code, status, title = "not_found", 404, "Not found"


class WrongMethod(Refusal):
    code, status, title = "method_not_allowed", 405, "Method not allowed"


class TooSlow(Refusal):
    code, status, title = "request_timeout", 408, "Request timeout"


class Conflict(Refusal):
    code, status, title = "conflict", 409, "Conflict"


class Changed(Refusal):
    code, status, title = "precondition_failed", 412, "Precondition failed"


class TooLarge(Refusal):
    code, status, title = "too_large", 413, "Content too large"


class WrongMedia(Refusal):
    code, status, title = "unsupported_media_type", 415, "Unsupported media type"


class Invalid(Refusal):
    """Fields that are wrong: `Invalid("body.name", "is taken")`."""

    code, status, title = "invalid", 422, "Invalid request"

    def __init__(self, field: str, reason: str, *more: tuple[str, str]) -> None:
        errors = [(field, reason), *more]
        super().__init__("; ".join(f"{name}: {why}" for name, why in errors[:5]), errors=errors)


class TooMany(Refusal):
    code, status, title = AdmissionError.code, 429, "Too many requests"


class Broken(Refusal):
    pass


class Away(Refusal):
    code, status, title = "unavailable", 503, "Unavailable"

    def __init__(self, message: str, retry_after_s: float = AWAY_S) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


KINDS: dict[int, type[Refusal]] = {
    kind.status: kind
    for kind in (
        Unauthenticated,
        Forbidden,
        NotFound,
        WrongMethod,
        TooSlow,
        Conflict,
        Changed,
        TooLarge,
        WrongMedia,
        Invalid,
        TooMany,
        Broken,
        Away,
    )
}


def type_of(kind: type[Refusal]) -> str:
    """The problem's `type`: a URN, since nothing is to be fetched there."""
    return "urn:privatelora:problem:" + (kind.code if kind is not Broken else "internal").replace("_", "-")


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error; one that nobody foresaw is logged, and told without its text."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return _of_status(error)
    if isinstance(error, AuthenticationError):
        return Unauthenticated(error.message, headers={"WWW-Authenticate": "Bearer"})
    if isinstance(error, AdmissionError):
        headers = error.headers if isinstance(error, TooManyError) else None
        return TooMany(error.message, retry_after_s=error.retry_after_s, headers=headers)
    if isinstance(error, JobConflictError):
        return Conflict(error.message)
    if isinstance(error, NoSuchJobError):
        return NotFound("there is no such job among what this key may see")
    if isinstance(error, ConfigurationError | DataError | ProtocolError):
        return Invalid("body", error.message)
    if isinstance(error, SQLAlchemyError):
        found = _of_database(error)
        if found is not None:
            return found
    if isinstance(error, RedisError):
        log.warning("valkey is away", reason=type(error).__name__)
        return Away("Valkey does not answer; try again")
    log.error("request failed", error=type(error).__name__, exc_info=error)
    return Broken("the service failed at its own work; tell the operator the request's id if it recurs")


def render(refusal: Refusal, *, for_device: bool = False) -> Response:
    """The response that tells a refusal, as `ErrorInfo` for devices."""
    headers = dict(refusal.headers)
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after_s)))
    if for_device:
        code = AdmissionError.code if refusal.status in (429, 503) else refusal.code
        told = ErrorInfo(code=code, message=refusal.message, retry_after_s=refusal.retry_after_s)
        return Response(msgspec.json.encode(told), refusal.status, headers, "application/json")
    body: dict[str, Any] = {
        "type": type_of(type(refusal)),
        "title": refusal.title,
        "status": refusal.status,
        "detail": shown(refusal.message, 2000),
    }
    if refusal.errors:
        body["errors"] = [{"field": shown(field), "reason": shown(reason)} for field, reason in refusal.errors]
    return Response(json.dumps(body), refusal.status, headers, MEDIA_TYPE)  # ASCII: a lone surrogate is escaped


def shown(text: str, chars: int = SHOWN_CHARS) -> str:
    """Text that a client sent, as it may be told back or logged: short, and no control characters."""
    cut = text if len(text) <= chars else text[:chars] + "…"
    return "".join(char if char.isprintable() else "�" for char in cut)


def _invalid(error: RequestValidationError) -> Invalid:
    errors = []
    for one in error.errors()[:20]:
        place = [str(part) for part in one["loc"] if not (isinstance(part, int) and one["type"] == "json_invalid")]
        reason = str(one.get("ctx", {}).get("error", one["msg"])) if one["type"] == "value_error" else str(one["msg"])
        errors.append((".".join(place) or "body", reason))
    return Invalid(*errors[0], *errors[1:])


def _of_status(error: HTTPException) -> Refusal:
    if error.status_code == 404:
        return NotFound("there is nothing at this path; /openapi.json lists what there is")
    if error.status_code == 405:
        return WrongMethod("this path has other methods, see Allow", headers=dict(error.headers or {}))
    if error.status_code == 400:  # FastAPI's, for a body that is no JSON at all
        return Invalid("body", "cannot be read as JSON")
    kind = KINDS.get(error.status_code, Broken)
    return kind(str(error.detail), headers=dict(error.headers or {}))


def _of_database(error: SQLAlchemyError) -> Refusal | None:
    if isinstance(error, StaleDataError):
        return Conflict("it was changed by someone else meanwhile; read it again and repeat")
    if isinstance(error, IntegrityError):
        return Conflict("another object has this name or place already, or one that this refers to is gone")
    if isinstance(error, ValueRefused):
        return Invalid("request", "has a value that the database cannot hold")
    if isinstance(error, PoolTimeout):
        return Away("the database has no connection free; try again")
    if isinstance(error, DBAPIError) and (error.connection_invalidated or type(error).__name__ != "ProgrammingError"):
        log.warning("database is away", reason=type(error.orig).__name__)
        return Away("the database does not answer; try again")
    return None
