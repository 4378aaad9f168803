"""`webhook`: tells an operator's URL that something happened, such as a quota's soft limit.

A POST of JSON. With PRIVATELORA_WEBHOOK_SECRET set it is signed: `Privatelora-Signature: sha256=` and the HMAC-SHA256
of the body. It is tried again until it is answered with 2xx; redirects are not followed.
"""

from __future__ import annotations

import hashlib
import hmac
import ssl
import time
from functools import cache
from typing import Annotated, Any

import httpx2 as httpx
import msgspec

from privatelora.platform.jobs.runner import JobFailedError, WorkerContext
from privatelora.protocol.jobs import JobKind

TIMEOUT_S = 10.0


class Params(msgspec.Struct, forbid_unknown_fields=True):
    url: Annotated[str, msgspec.Meta(pattern="^https?://", max_length=500)]
    payload: dict[str, Any] = {}


class Report(msgspec.Struct, forbid_unknown_fields=True):
    status: Annotated[int, msgspec.Meta(ge=200, le=299)]
    seconds: Annotated[float, msgspec.Meta(ge=0, le=600)]


KIND = JobKind("webhook", Params, Report)


def run(context: WorkerContext) -> dict[str, int | float]:
    body = msgspec.json.encode(context.params["payload"] | {"job": context.job_id})
    headers = {"Content-Type": "application/json", "User-Agent": "privatelora"}
    if context.settings.webhook_secret is not None:
        secret = context.settings.webhook_secret.get_secret_value().encode()
        headers["Privatelora-Signature"] = "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest()
    started = time.perf_counter()
    try:
        with httpx.stream(  # whose body is not read, however long it is
            "POST", context.params["url"], content=body, headers=headers, timeout=TIMEOUT_S, verify=_trusted()
        ) as answer:
            status = answer.status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise JobFailedError(f"the webhook's URL does not answer ({type(error).__name__})", retry=True) from None
    if not 200 <= status < 300:
        raise JobFailedError(f"the webhook's URL answered {status}", retry=True)
    return {"status": status, "seconds": time.perf_counter() - started}


@cache
def _trusted() -> ssl.SSLContext:
    """The certificates that are trusted, which take 20 ms to read."""
    return httpx.create_ssl_context()
