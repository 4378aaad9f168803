"""The control plane as a device's agent sees it: registers this installation, takes offers, and says how jobs went.

    ControlPlane(service).register(...)  .offers(...)  .accept(...)  .start(...)  .heartbeat(...)  .report(...)

Every error of HTTP becomes one of the tree: `ConnectionLostError` and `AdmissionError` may be tried again,
`JobGoneError` says that the job, or this device, is not known there any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import httpx2 as httpx
import msgspec

from privatelora.protocol.errors import (
    AdmissionError,
    AuthenticationError,
    ConfigurationError,
    ConnectionLostError,
    IncompatibleError,
    PrivateLoraError,
    ProtocolError,
)

API = "/api/v1"
SLACK_S = 10.0  # beyond the time of a long poll

Answer = TypeVar("Answer")


class JobGoneError(PrivateLoraError):
    """The job was cancelled, has expired, or is another holder's (409), or is not there (404): report nothing."""

    code = "job_gone"


class Registered(msgspec.Struct, frozen=True):
    """This installation, as the control plane knows it."""

    id: str


class Offer(msgspec.Struct, frozen=True):
    """A job that is offered; `fence` goes into everything that is said of it."""

    id: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z_]{1,64}$")]  # goes into a path, and onto a terminal
    kind: Annotated[str, msgspec.Meta(pattern="^[0-9a-z-]{1,64}$")]
    params: dict[str, Any]
    fence: int
    lease_s: Annotated[float, msgspec.Meta(gt=0)]


class Offers(msgspec.Struct, frozen=True):
    items: list[Offer]


class Problem(msgspec.Struct, frozen=True):
    """RFC 9457."""

    title: str = ""
    detail: str = ""


class ControlPlane:
    """The agent's routes of one service."""

    def __init__(self, base_url: str, token: str, timeout_s: float, verify: Any = True) -> None:
        self.base_url, self._timeout_s = base_url, timeout_s
        self._client = httpx.Client(
            base_url=base_url + API,
            headers={"Authorization": f"Bearer {token}"},
            timeout=timeout_s,
            verify=verify,
            trust_env=False,
        )

    def register(self, installation: str, name: str, allows: Sequence[str]) -> Registered:
        """Make this installation known, with the kinds of job that its owner allows."""
        body = {"name": name, "allows": list(allows)}
        try:
            return self._ask("PUT", f"/installations/{installation}", body, Registered)
        except JobGoneError as error:
            raise ConfigurationError(
                f"{self.base_url} has no control plane to take jobs from ({error.message}); is the URL right?"
            ) from None

    def offers(self, device: str, wait_s: float) -> list[Offer]:
        """Jobs for this device, after `wait_s` at most."""
        path = f"/devices/{device}/offers?wait_s={wait_s:g}"
        return self._ask("POST", path, None, Offers, self._timeout_s + wait_s + SLACK_S).items

    def accept(self, device: str, offer: Offer) -> None:
        self._say(device, offer, "accept")

    def start(self, device: str, offer: Offer) -> None:
        self._say(device, offer, "start")

    def heartbeat(self, device: str, offer: Offer) -> None:
        self._say(device, offer, "heartbeat")

    def refuse(self, device: str, offer: Offer, reason: str) -> None:
        self._say(device, offer, "refuse", {"reason": _plain(reason, 200)})

    def fail(self, device: str, offer: Offer, error: str, retry: bool) -> None:
        self._say(device, offer, "fail", {"error": _plain(error, 500), "retry": retry})

    def report(self, device: str, offer: Offer, numbers: Mapping[str, int | float]) -> None:
        self._say(device, offer, "result", {"report": dict(numbers)})

    def close(self) -> None:
        self._client.close()

    def _say(self, device: str, offer: Offer, what: str, more: Mapping[str, Any] | None = None) -> None:
        body = {"device_id": device, "fence": offer.fence, **(more or {})}
        self._ask("POST", f"/jobs/{offer.id}/{what}", body, dict[str, Any])

    def _ask(self, method: str, path: str, body: Any, answer: type[Answer], timeout_s: float | None = None) -> Answer:
        try:
            response = self._client.request(method, path, json=body, timeout=timeout_s or self._timeout_s)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ConnectionLostError(f"{self.base_url} cannot be reached ({reason})") from None
        if response.status_code >= 400:
            raise _error(response)
        try:
            return msgspec.json.decode(response.content, type=answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise IncompatibleError(f"{self.base_url} answered what no control plane answers ({error})") from None


def _plain(text: str, most: int) -> str:
    """A text in one line, without what no terminal should be sent."""
    return "".join(char if char.isprintable() else " " for char in text)[:most]


def _error(response: httpx.Response) -> PrivateLoraError:
    status = response.status_code
    try:
        problem = msgspec.json.decode(response.content, type=Problem)
        said = problem.detail or problem.title
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = ""
    said = said or f"{response.url} answered HTTP status {status}"
    if status == 429 or status >= 500:
        after = response.headers.get("retry-after", "")
        return AdmissionError(said, retry_after_s=float(after) if after.isdigit() else None)
    if status in (404, 409):
        return JobGoneError(said)
    if status in (401, 403):
        return AuthenticationError(said)
    return ProtocolError(said) if status == 422 else ConfigurationError(said)
