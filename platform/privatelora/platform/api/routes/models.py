"""/api/v1/models: the frozen models that backbones host, or have hosted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import select
from starlette.responses import Response

from privatelora.platform.api.answers import IfNoneMatch, answer, one
from privatelora.platform.api.auth import AnyCall, not_found
from privatelora.platform.api.fields import Sha256, Shown, When
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.tables import PublishedModel

router = APIRouter(prefix="/api/v1/models", tags=["models"])

_ORDERS = {"sha256": (PublishedModel.sha256,)}


class ModelShown(Shown):
    """A frozen model."""

    sha256: Sha256
    name: str = Field(examples=["SmolLM2-135M-Instruct"])
    dtype: str = Field(examples=["bfloat16"])
    shape: dict[str, Any] = Field(examples=[{"hidden": 576, "layers": 30, "q": 576, "k": 192, "v": 192}])
    context_length: int = Field(examples=[8192])
    published_at: When


class ModelQuery(Paging):
    sort: Literal["sha256", "-sha256"] = "sha256"


@router.get("", response_model=Page[ModelShown], summary="List models")
def list_models(call: AnyCall, query: Annotated[ModelQuery, Query()]) -> Response:
    """Every model that a backbone hosts or has hosted."""
    with call.services.database.read() as session:
        rows, following = fetch(session, select(PublishedModel), _ORDERS, query)
    return answer(Page(items=[ModelShown.model_validate(row) for row in rows], next=following))


@router.get("/{sha256}", response_model=ModelShown, summary="One model")
def get_model(call: AnyCall, sha256: Sha256, if_none_match: IfNoneMatch = None) -> Response:
    """A frozen model."""
    with call.services.database.read() as session:
        row = session.get(PublishedModel, sha256)
    if row is None:
        raise not_found("model")
    return one(ModelShown.model_validate(row), if_none_match)
