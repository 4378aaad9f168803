"""The OpenAPI document: FastAPI's, with every error that a route may answer as a problem (RFC 9457)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from privatelora.platform.api.problems import KINDS, MEDIA_TYPE, FieldProblem, Problem, type_of
from privatelora.protocol.messages import INFO_PATH

WITH_BODY = ("post", "put", "patch")
NOT_JSON = (INFO_PATH,)  # answers errors as devices know them
DESCRIPTION = (
    "Who may connect to a PrivateLoRA service, how much they may use, what runs when, and what was used. "
    "Errors are RFC 9457 problem details; lists are pages with `next` as the cursor of the following one; "
    "`Idempotency-Key` makes a POST safe to repeat; `ETag`, `If-None-Match` and `If-Match` guard reads and changes."
)
RATE = {
    "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds until it may be tried again."},
    "RateLimit-Limit": {"schema": {"type": "integer"}, "description": "Requests a minute."},
    "RateLimit-Remaining": {"schema": {"type": "integer"}, "description": "Of them, left."},
    "RateLimit-Reset": {"schema": {"type": "integer"}, "description": "Seconds until they are all there again."},
}


def document(app: FastAPI) -> dict[str, Any]:
    """The document of `app`."""
    found: dict[str, Any] = get_openapi(
        title="privatelora control plane",
        version=version("privatelora-platform"),
        description=DESCRIPTION,
        routes=app.routes,
    )
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for model in (Problem, FieldProblem):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)
        schemas[model.__name__] = schema
    schemas["DeviceError"] = _DEVICE_ERROR
    responses = components.setdefault("responses", {})
    for status in KINDS:
        responses[_name(status)] = _response(status)
        responses["Device" + _name(status)] = _device_response(status)
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            if isinstance(operation, dict):
                _document_errors(path, method, operation)
                _give_examples(operation, schemas)
    return found


def _give_examples(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """An example for the body and each answer that has none of its own."""
    described = [operation.get("requestBody", {}), *operation["responses"].values()]
    for media in (media for one in described for media in one.get("content", {}).values()):
        if media.get("schema"):
            media.setdefault("example", _example(media["schema"], schemas))


def _example(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """An example of a schema: its own, or put together from those of its parts."""
    if "$ref" in schema:
        return _example(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    for name in ("examples", "enum", "anyOf"):
        if name in schema:
            first = schema[name][0]
            return _example(first, schemas) if name == "anyOf" else first
    if "default" in schema:
        return schema["default"]
    if schema.get("type") == "object":
        return {name: _example(part, schemas) for name, part in schema.get("properties", {}).items()}
    if schema.get("type") == "array":
        return [_example(schema["items"], schemas)]
    return {"string": "text", "integer": 1, "number": 1.0, "boolean": True}.get(schema.get("type", ""))


def _document_errors(path: str, method: str, operation: dict[str, Any]) -> None:
    named = {parameter["name"] for parameter in operation.get("parameters", ())}
    known = {500, 503}
    if "security" in operation:
        known |= {401, 403, 429}
    if named or "requestBody" in operation:
        known.add(422)
    if "{" in path:
        known.add(404)
    if method in (*WITH_BODY, "delete"):
        known |= {408, 409, 413, 415, 422}
    if "If-Match" in named:
        known.add(412)
    answers = operation["responses"]
    answers.pop("422", None)
    if "If-None-Match" in named:
        answers["304"] = {"description": "Not modified: the client has it already."}
    for status in sorted(known):
        prefix = "Device" if path in NOT_JSON else ""
        answers[str(status)] = {"$ref": f"#/components/responses/{prefix}{_name(status)}"}


def _name(status: int) -> str:
    return KINDS[status].title.title().replace(" ", "")


def _response(status: int) -> dict[str, Any]:
    kind = KINDS[status]
    example: dict[str, Any] = {
        "type": type_of(kind), "title": kind.title, "status": status, "detail": "what happened, and what to do next",
    }  # fmt: skip
    if status == 422:
        example["errors"] = [{"field": "body.name", "reason": "String should have at most 120 characters"}]
    schema = {"$ref": "#/components/schemas/Problem"}
    found: dict[str, Any] = {
        "description": kind.title,
        "content": {MEDIA_TYPE: {"schema": schema, "example": example}},
    }
    if status == 429:
        found["headers"] = RATE
    if status == 503:
        found["headers"] = {"Retry-After": RATE["Retry-After"]}
    if status == 401:
        found["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}, "description": "Bearer"}}
    return found


def _device_response(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/DeviceError"}
    example = {"code": KINDS[status].code, "message": "what happened, and what to do next", "retry_after_s": None}
    return {
        "description": KINDS[status].title,
        "content": {"application/json": {"schema": schema, "example": example}},
    }


_DEVICE_ERROR = {
    "title": "DeviceError",
    "description": "What a device is told: a code of the error tree, and what to do next.",
    "type": "object",
    "required": ["code", "message"],
    "properties": {
        "code": {"type": "string"},
        "message": {"type": "string"},
        "retry_after_s": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
}
