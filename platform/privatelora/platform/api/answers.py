"""Answers with JSON bodies, their ETags, and what If-None-Match and If-Match make of them.

An ETag is `"version.digest"`: the digest is of the body, so that a 304 never hides a change, also not of what is not
written with the object (such as when a key was last used); If-Match compares the version, which only a change of the
object counts up. Objects without a version have the digest alone.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated

from fastapi import Header
from pydantic import BaseModel
from starlette.responses import Response

from privatelora.platform.api.problems import Changed

IfNoneMatch = Annotated[
    str | None,
    Header(alias="If-None-Match", max_length=1000, description="ETags that are known; answered with 304 if one holds."),
]
IfMatch = Annotated[
    str | None,
    Header(alias="If-Match", max_length=1000, description="ETag that must still hold for the change; else 412."),
]
_TAG = re.compile(r'(W/)?"([!#-~]*)"')


def answer(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A model as JSON."""
    return Response(body.model_dump_json(by_alias=True), status, headers, "application/json")


def one(body: BaseModel, if_none_match: str | None = None, version: int | None = None) -> Response:
    """A single object, with its ETag; 304 without a body if the client has this already."""
    text = body.model_dump_json(by_alias=True).encode()
    tag = tag_of(text, version)
    headers = {"ETag": f'"{tag}"'}
    if if_none_match is not None and _names(if_none_match, tag):
        return Response(None, 304, headers)
    return Response(text, 200, headers, "application/json")


def tag_of(body: bytes, version: int | None) -> str:
    """The ETag of a body without its quotes."""
    digest = hashlib.sha256(body).hexdigest()[:12]
    return digest if version is None else f"{version}.{digest}"


def check_match(if_match: str | None, version: int) -> None:
    """Raise `Changed` unless one of the ETags is of this version."""
    if if_match is None or if_match.strip() == "*":
        return
    versions = [tag.partition(".")[0] for weak, tag in _TAG.findall(if_match) if not weak]
    if str(version) not in versions:
        raise Changed(f"it is at version {version} now; read it again and repeat the change")


def _names(header: str, tag: str) -> bool:
    return header.strip() == "*" or any(found == tag for _, found in _TAG.findall(header))
