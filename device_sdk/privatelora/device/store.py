"""The local store: one file an adapter, written atomically, readable by its owner only, encrypted on request.

A file is safetensors (arrays by `record/name`, the config records as JSON in its metadata), so nothing in it can run.
With a passphrase the whole file is sealed with AES-256-GCM under a key from scrypt (RFC 7914). One process at a time
holds a store's lock. Data comes from and goes to `state.py`'s RecordDict.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from glob import escape
from pathlib import Path
from typing import IO

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from flwr.common import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from privatelora.device.state import IDENTITY
from privatelora.protocol.errors import StoreError

FORMAT = "privatelora-adapter-1"
SEALED = b"privatelora-sealed-1"  # followed by 16 bytes of salt, 12 of nonce, and the ciphertext
SALT_BYTES, NONCE_BYTES = 16, 12
TEMPORARY = "????????"  # what `tempfile` puts at the end of a name
SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**15, 8, 1  # 32 MiB and about 0.1 s a guess


class Store:
    """The file of one named adapter, locked while this object lives."""

    def __init__(self, directory: Path, name: str, passphrase: str | None = None) -> None:
        if not name or name != Path(name).name or name.startswith("."):
            raise StoreError(f"adapter name {name!r} cannot be a file name; use letters, digits, - and _")
        self.path = directory / f"{name}.adapter"
        self._seal = Seal(passphrase) if passphrase is not None else None
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(directory / f".{name}.lock", os.O_WRONLY | os.O_CREAT, 0o600)
            self._lock: IO[bytes] = os.fdopen(lock, "wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in directory.glob(f".{escape(self.path.name)}.{TEMPORARY}"):  # by a process that died as it wrote
                left.unlink()
        except BlockingIOError:
            raise StoreError(
                f"adapter {name!r} in {directory} is in use by another process; close it, or choose another name="
            ) from None
        except OSError as error:
            raise StoreError(f"{directory} cannot be used as a store ({error}); set PRIVATELORA_STORE_DIR") from None

    def read(self) -> RecordDict | None:
        """The saved state, or None if there is none yet."""
        return read_state(self.path, self._seal) if self.path.exists() else None

    def write(self, state: RecordDict) -> None:
        """Replace the saved state in one step: a reader sees the old file or the new one, whole."""
        write_state(self.path, state, self._seal)

    def close(self) -> None:
        self._lock.close()


class Seal:
    """Encryption under a passphrase; the derived key is kept, so that it costs its 0.1 s once a salt."""

    def __init__(self, passphrase: str) -> None:
        if not passphrase:
            raise StoreError("the passphrase is empty, which would protect nothing; give one, or none at all")
        self._passphrase = passphrase.encode()
        self._salt, self._key = b"", b""

    def close(self, content: bytes) -> bytes:
        """Encrypt."""
        key = self._derive(self._salt or os.urandom(SALT_BYTES))
        nonce = os.urandom(NONCE_BYTES)
        return SEALED + self._salt + nonce + AESGCM(key).encrypt(nonce, content, SEALED)

    def open(self, sealed: bytes) -> bytes:
        """Decrypt; raises `StoreError` for a wrong passphrase or a damaged file."""
        body = sealed[len(SEALED) :]
        salt, nonce = body[:SALT_BYTES], body[SALT_BYTES : SALT_BYTES + NONCE_BYTES]
        try:
            return AESGCM(self._derive(salt)).decrypt(nonce, body[SALT_BYTES + NONCE_BYTES :], SEALED)
        except (InvalidTag, ValueError):
            raise StoreError("the passphrase is wrong, or the file is damaged; try the passphrase again") from None

    def _derive(self, salt: bytes) -> bytes:
        if salt != self._salt:
            kdf = Scrypt(salt=salt, length=32, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P)
            self._salt, self._key = salt, kdf.derive(self._passphrase)
        return self._key


def write_state(path: Path, state: RecordDict, seal: Seal | None = None) -> None:
    """Write a state to `path` atomically, mode 0600; raises `StoreError` and keeps the old file if it cannot."""
    arrays = {
        f"{record}/{name}": array.numpy()
        for record, entries in state.array_records.items()
        for name, array in entries.items()
    }
    configs = {name: dict(record) for name, record in state.config_records.items()}
    content = save(arrays, {"format": FORMAT, "configs": json.dumps(configs)})
    if seal is not None:
        content = seal.close(content)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(content)  # the temporary file is 0600 from the start
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error}); the last saved state is still there. Free space, or choose another "
            "place"
        ) from None


def read_state(path: Path, seal: Seal | None = None) -> RecordDict:
    """Read a state; raises `StoreError` for a missing, damaged or sealed file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error}); check the path") from None
    if content.startswith(SEALED):
        if seal is None:
            raise StoreError(f"{path} is encrypted; pass passphrase=")
        content = seal.open(content)
    elif seal is not None:
        raise StoreError(
            f"{path} is not encrypted, but a passphrase was given; open it without one, or choose another name"
        )
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        if header["format"] != FORMAT:
            raise StoreError(f"{path} has format {header['format']}; this release reads {FORMAT}")
        arrays = load(content)
        records: dict[str, dict[str, Array]] = {}
        for key, array in arrays.items():
            record, _, name = key.partition("/")
            records.setdefault(record, {})[name] = Array(np.ascontiguousarray(array))
        configs = {name: ConfigRecord(values) for name, values in json.loads(header["configs"]).items()}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{path} is not a saved adapter, or is damaged ({error!r}); restore it from a backup"
        ) from None
    if IDENTITY not in configs:
        raise StoreError(f"{path} does not say what it belongs to; it is not a saved adapter")
    return RecordDict({**{name: ArrayRecord(array_dict=entries) for name, entries in records.items()}, **configs})
