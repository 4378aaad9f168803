"""The service as a device sees it over HTTP: its announcement, and downloads that are kept by their hash.

`Service` is made from one base URL and a token; `exchange.py` opens the data plane that it announces.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import ssl
import tempfile
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import httpx2 as httpx

from privatelora.protocol import local
from privatelora.protocol.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectionLostError,
    IncompatibleError,
    PrivateLoraError,
    ProtocolError,
    StoreError,
)
from privatelora.protocol.frames import VERSION
from privatelora.protocol.messages import INFO_PATH, Blob, ErrorInfo, ServiceInfo, parse

CHUNK_BYTES = 1 << 20


class Service:
    """One PrivateLoRA service.

    Parameters
    ----------
    base_url : http:// on this machine, https:// elsewhere.
    token : bearer token; else PRIVATELORA_TOKEN, else the token file of an embedded service on this machine.
    allow_plain : permit http:// to another host, where everyone on the way can read the activations.
    ca_file : PEM of an authority to trust besides the system's.
    """

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        *,
        allow_plain: bool = False,
        ca_file: str | Path | None = None,
        cache_dir: str | Path | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self.base_url, self.allow_plain = base_url.rstrip("/"), allow_plain
        self.token, self.tls = access(self.base_url, token, allow_plain, ca_file)
        self.timeout_s = timeout_s
        self.cache = Path(cache_dir) if cache_dir else local.cache_dir()
        self._client = httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=timeout_s,
            verify=self.tls if self.tls is not None else True,
            trust_env=False,
        )
        self.info = self._read_info()

    @property
    def data_plane_url(self) -> str:
        """ws:// or wss:// URL of the data plane."""
        announced = self.info.data_plane
        if announced.startswith("ws"):
            announced = "http" + announced.removeprefix("ws")
        return "ws" + self._url_of(announced).removeprefix("http")

    @property
    def may_move(self) -> bool:
        """Whether the data plane is another process than the one that announces it, and may be elsewhere tomorrow."""
        return not self.info.data_plane.startswith("/")

    def refresh(self) -> None:
        """Read the announcement again, as after a restart of the service."""
        self.info = self._read_info()

    def download(self, blob: Blob) -> Path:
        """File of a published blob: from the cache, or fetched once and checked against its hash."""
        path = self.cache / "blobs" / blob.sha256
        if path.is_file() and path.stat().st_size == blob.nbytes:
            return path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                try:
                    digest = hashlib.sha256()
                    with self._client.stream("GET", f"{self._url_of(self.info.blobs)}/{blob.sha256}") as response:
                        _raise_for(response)
                        for chunk in response.iter_bytes(CHUNK_BYTES):
                            digest.update(chunk)
                            file.write(chunk)
                    if digest.hexdigest() != blob.sha256:
                        raise ConnectionLostError(f"download of {blob.sha256[:12]} arrived damaged; try again")
                    file.flush()
                    Path(file.name).replace(path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except httpx.HTTPError as error:
            raise ConnectionLostError(f"{self.base_url} broke off a download ({error}); try again") from None
        except OSError as error:
            raise StoreError(
                f"{path.parent} cannot hold a download of {blob.nbytes} bytes ({error}); free space there, or set "
                "PRIVATELORA_CACHE_DIR"
            ) from None
        return path

    def close(self) -> None:
        self._client.close()

    def _url_of(self, announced: str) -> str:
        """An announced path at this service, or an announced URL, which must be as safe as the service's own."""
        if announced.startswith("/"):
            return self.base_url + announced
        try:
            _checked(announced, self.allow_plain)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.base_url} sends this device on: {error.message}") from None
        return announced

    def _read_info(self) -> ServiceInfo:
        try:
            response = self._client.get(INFO_PATH)
        except httpx.HTTPError as error:
            if untrusted := _untrusted_certificate(error):
                raise ConnectionLostError(
                    f"the certificate of {self.base_url} is not trusted ({untrusted.verify_message}); pass ca_file= "
                    "with the authority that signed it"
                ) from None
            raise ConnectionLostError(
                f"{self.base_url} cannot be reached ({error}); is the service running? Start one with `privatelora up`"
            ) from None
        _raise_for(response)
        try:
            info = parse(response.content, ServiceInfo)
        except ProtocolError as error:
            raise IncompatibleError(f"{self.base_url} does not announce a PrivateLoRA service ({error})") from None
        if info.protocol_version != VERSION:
            raise IncompatibleError(
                f"{self.base_url} speaks protocol version {info.protocol_version}, this device {VERSION}; install the "
                "same release on both"
            )
        return info


def access(
    base_url: str, token: str | None, allow_plain: bool, ca_file: str | Path | None
) -> tuple[str, ssl.SSLContext | None]:
    """The token for a service, and the TLS that its URL needs; arguments as `Service` has them.

    Raises `ConfigurationError` for a URL that is not safe or none, `AuthenticationError` where there is no token.
    """
    parts = _checked(base_url, allow_plain)
    on_this_machine = _is_loopback(parts.hostname or "")
    found = token or os.environ.get("PRIVATELORA_TOKEN") or (_local_token() if on_this_machine else None)
    known = (found or "").strip()  # a file's or a variable's last line end is no part of it
    if not known:
        raise AuthenticationError(
            f"{base_url} needs a token: pass token=, or set PRIVATELORA_TOKEN to the one that its operator gave you"
        )
    if not known.isascii() or not known.isprintable():
        raise AuthenticationError("the token holds characters that no token has; copy it again, whole")
    return known, _tls_context(ca_file) if ca_file or parts.scheme == "https" else None


def _checked(url: str, allow_plain: bool) -> SplitResult:
    """The parts of a URL that may be used; raises `ConfigurationError`."""
    parts = _split_url(url)
    if parts.scheme == "http" and not _is_loopback(parts.hostname or "") and not allow_plain:
        raise ConfigurationError(
            f"{url} is a plain connection to another host, which shows your activations and your token to the "
            "network; use https://, or pass allow_plain=True (--allow-plain) to accept that"
        )
    return parts


def _raise_for(response: httpx.Response) -> None:
    if response.status_code < 400:
        return
    body = response.read()
    try:
        error: PrivateLoraError = parse(body, ErrorInfo).to_error()
    except ProtocolError:
        error = ConnectionLostError(f"{response.url} answered HTTP status {response.status_code}; is the URL right?")
    raise error


def _split_url(base_url: str) -> SplitResult:
    try:
        parts = urlsplit(base_url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # a port or an address that is none
        pass
    raise ConfigurationError(f"server {base_url!r} is not a base URL; write it as https://host:port")


def _untrusted_certificate(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """The reason behind an HTTP error, if it is that the other end's certificate was refused."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _local_token() -> str | None:
    try:
        return local.token_path(local.data_dir()).read_text().strip()
    except OSError:
        return None


def _tls_context(ca_file: str | Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
    except OSError as error:
        raise ConfigurationError(f"ca_file {ca_file} cannot be used ({error}); give a PEM file") from None
    return context
