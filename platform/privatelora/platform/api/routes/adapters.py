"""/api/v1/adapters: published sets of A and B, by their hash. Backbones publish them; no user is in one."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import select
from starlette.responses import Response

from privatelora.platform.api.answers import IfNoneMatch, answer, one
from privatelora.platform.api.auth import AnyCall, not_found
from privatelora.platform.api.fields import Sha256, Shown, When
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.tables import PublishedSet

router = APIRouter(prefix="/api/v1/adapters", tags=["adapters"])

_ORDERS = {"sha256": (PublishedSet.sha256,)}


class SetShown(Shown):
    """A published set of A and B."""

    sha256: Sha256
    kind: str = Field(examples=["calibrated"])
    model_hash: Sha256
    max_rank_down: int = Field(examples=[128])
    max_rank_up: int = Field(examples=[128])
    nbytes: int = Field(examples=[26_542_080])
    default: bool = Field(description="Whether new adapters of its kind get it.")
    published_at: When


class SetQuery(Paging):
    sort: Literal["sha256", "-sha256"] = "sha256"
    model_hash: Sha256 | None = Field(default=None, description="Sets for this model.")


@router.get("", response_model=Page[SetShown], summary="List adapter sets")
def list_sets(call: AnyCall, query: Annotated[SetQuery, Query()]) -> Response:
    """Every published set; `GET /v1/blobs/{sha256}` of a backbone has the file."""
    found = select(PublishedSet)
    if query.model_hash is not None:
        found = found.where(PublishedSet.model_hash == query.model_hash)
    with call.services.database.read() as session:
        rows, following = fetch(session, found, _ORDERS, query)
    return answer(Page(items=[SetShown.model_validate(row) for row in rows], next=following))


@router.get("/{sha256}", response_model=SetShown, summary="One adapter set")
def get_set(call: AnyCall, sha256: Sha256, if_none_match: IfNoneMatch = None) -> Response:
    """A published set of A and B."""
    with call.services.database.read() as session:
        row = session.get(PublishedSet, sha256)
    if row is None:
        raise not_found("adapter set")
    return one(SetShown.model_validate(row), if_none_match)
