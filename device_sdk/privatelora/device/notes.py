"""What an agent remembers across restarts, in the store's folder: the job it has begun, and the day's bytes.

`.agent.json` holds an id and a few numbers. One agent at a time has them: two would take each other's jobs, since a
control plane tells them apart by the installation only.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privatelora.protocol.errors import StoreError


class Notes:
    """The notes of a store's folder, locked while this object lives; raises `StoreError` where that cannot be."""

    def __init__(self, store_dir: Path) -> None:
        self._path = store_dir / ".agent.json"
        try:
            store_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.fdopen(os.open(store_dir / ".agent.lock", os.O_WRONLY | os.O_CREAT, 0o600), "wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kept = json.loads(self._path.read_text()) if self._path.exists() else {}
        except BlockingIOError:
            self._lock.close()
            raise StoreError(f"another agent runs in {store_dir}; stop it, or set PRIVATELORA_STORE_DIR") from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{self._path} cannot be used ({error}); delete it, or free its folder") from None
        self._kept: dict[str, Any] = kept if isinstance(kept, dict) else {}

    @property
    def begun(self) -> str | None:
        """Id of the job that was begun last and has not ended here."""
        return self._kept.get("begun")

    def begin(self, job: str) -> None:
        """A job begins here."""
        if job != self.begun:
            self._write(begun=job, numbers=None)

    def finish(self, numbers: Mapping[str, int | float]) -> None:
        """The job that was begun is done; its report is still to be told."""
        self._write(numbers=dict(numbers))

    def report(self, job: str) -> dict[str, int | float] | None:
        """What a job has to report that was done here and not told."""
        return self._kept.get("numbers") if job == self.begun else None

    def end(self) -> None:
        """Nothing is left of the job that was begun."""
        self._write(begun=None, numbers=None)

    @property
    def moved_today(self) -> int:
        """Bytes that jobs have moved since midnight, local time."""
        return int(self._kept.get("moved", 0)) if self._kept.get("day") == _today() else 0

    def add(self, moved: int) -> None:
        """Jobs have moved so many bytes more."""
        if moved:
            self._write(moved=self.moved_today + moved, day=_today())

    def close(self) -> None:
        """Let another agent have them."""
        self._lock.close()

    def _write(self, **changes: Any) -> None:
        self._kept |= changes
        new = self._path.with_suffix(".new")
        try:
            new.touch(mode=0o600)
            new.write_text(json.dumps(self._kept))
            new.replace(self._path)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written ({error}); free space there") from None


def _today() -> str:
    return time.strftime("%Y-%m-%d")
