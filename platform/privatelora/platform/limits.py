"""How often a key may ask, and how often an address may come with a wrong key; counted in this process's memory.

An address that sent too many wrong keys must wait, also with keys that it has not used before, so that guessing goes on
no faster than the limit says. Keys that have worked from that address go on: whoever shares it is not locked out.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from privatelora.protocol.errors import AdmissionError

REMEMBERED = 10_000  # keys that have worked, by address


class TooManyError(AdmissionError):
    """A key asks too often, or an address guesses; `headers` are RateLimit-*'s."""

    def __init__(self, message: str, *, retry_after_s: float, headers: dict[str, str]) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.headers = headers


@dataclass(frozen=True)
class Allowance:
    """What a key may still ask for."""

    limit: int
    remaining: int
    reset_s: int

    def headers(self) -> dict[str, str]:
        return {
            "RateLimit-Limit": str(self.limit),
            "RateLimit-Remaining": str(self.remaining),
            "RateLimit-Reset": str(self.reset_s),
        }


class Limits:
    """Counts of one process; to be used from its event loop only."""

    def __init__(self, requests_per_minute: int, wrong_keys_per_minute: int) -> None:
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._requests = RateLimitItemPerMinute(requests_per_minute)
        self._wrong = RateLimitItemPerMinute(wrong_keys_per_minute)
        self._worked: OrderedDict[tuple[str, str], None] = OrderedDict()

    def check_address(self, address: str, digest: str) -> None:
        """Raise `TooManyError` for an address that sent too many wrong keys, unless this key has worked from it."""
        if (address, digest) not in self._worked and not self._window.test(self._wrong, "address", _network(address)):
            allowance = self._allowance(self._wrong, "address", _network(address))
            raise TooManyError(
                f"more than {self._wrong.amount} requests with a wrong key came from this address within a minute; "
                f"wait {allowance.reset_s} s, and check the key",
                retry_after_s=allowance.reset_s,
                headers=allowance.headers(),
            )

    def count_wrong(self, address: str) -> None:
        """A wrong key came from an address."""
        self._window.hit(self._wrong, "address", _network(address))

    def count_right(self, address: str, digest: str) -> None:
        """A key worked."""
        self._worked[address, digest] = None
        self._worked.move_to_end((address, digest))
        if len(self._worked) > REMEMBERED:
            self._worked.popitem(last=False)

    def spend(self, key_id: str) -> Allowance:
        """Count a request of a key; raises `TooManyError` when its minute is spent."""
        allowed = self._window.hit(self._requests, "key", key_id)
        allowance = self._allowance(self._requests, "key", key_id)
        if not allowed:
            raise TooManyError(
                f"this key has made its {self._requests.amount} requests of the last minute; "
                f"wait {allowance.reset_s} s",
                retry_after_s=allowance.reset_s,
                headers=allowance.headers(),
            )
        return allowance

    def _allowance(self, item: RateLimitItemPerMinute, kind: str, name: str) -> Allowance:
        stats = self._window.get_window_stats(item, kind, name)
        return Allowance(item.amount, max(0, stats.remaining), max(1, round(stats.reset_time - time.time())))


def _network(address: str) -> str:
    """An address as it is counted: of IPv6 the first 64 bits, since one host has all of the others."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(IPv6Address(int(parsed) >> 64 << 64))
    return str(parsed)
