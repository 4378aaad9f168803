"""The local store: written in one step or not at all, for its owner only, encrypted on request, one process a name.

Crashes, full disks and second processes are real: children that die, a tmpfs that is too small, a limit of the kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.common import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.children import child_of, exit_code_of
from tests.support.fleet import Fleet

from privatelora.device.state import Identity
from privatelora.device.store import SEALED, Seal, Store, read_state, write_state
from privatelora.protocol.errors import ConfigurationError, StoreError

PASSPHRASE = "correct horse"
TOO_MUCH = 1 << 18  # numbers in an adapter that no disk of these tests has room for: 1 MiB
VALUES = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 12)

same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def state_of(values: np.ndarray = VALUES, step: int = 3) -> RecordDict:
    """A state as `DeviceSession.state` gives it: arrays by name, and what they belong to."""
    arrays = ArrayRecord(array_dict={"m.0.weight": Array(values)})
    identity = ConfigRecord({"json": json.dumps({"model_hash": "a" * 64})})
    return RecordDict({"adapter": arrays, "progress": ConfigRecord({"step": step}), "identity": identity})


def values_of(state: RecordDict | None) -> np.ndarray:
    assert state is not None
    return state.array_records["adapter"]["m.0.weight"].numpy()


# -- what is written is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE], ids=["plain", "sealed"])
def test_what_is_written_is_read(tmp_path: Path, passphrase: str | None) -> None:
    store = Store(tmp_path / "store", "mine", passphrase)
    assert store.read() is None
    store.write(state_of())
    store.close()
    found = Store(tmp_path / "store", "mine", passphrase).read()
    assert values_of(found).tobytes() == VALUES.tobytes()
    assert values_of(found).shape == VALUES.shape
    assert found is not None
    assert dict(found.config_records["progress"]) == {"step": 3}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_read(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = Store(tmp_path / "store", "mine")
        store.write(state_of())
        write_state(tmp_path / "store" / "saved", state_of())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    files = list((tmp_path / "store").iterdir())
    assert len(files) == 3  # the adapter, the lock, and what was saved beside
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "../outside", "a/b", "/etc/passwd"])
def test_a_name_that_leads_out_of_the_store_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="use letters"):
        Store(tmp_path / "store", name)


def test_a_store_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="PRIVATELORA_STORE_DIR"):
        Store(tmp_path / "file" / "store", "mine")


# -- crashes ----------------------------------------------------------------------------------------------------------


def test_a_crash_before_the_rename_leaves_the_old_state(tmp_path: Path) -> None:
    store = Store(tmp_path, "mine")
    store.write(state_of())

    def crash() -> None:
        Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]  # that is the fault
        write_state(store.path, state_of(-VALUES, step=4))

    assert exit_code_of(crash) == -signal.SIGKILL
    assert values_of(store.read()).tobytes() == VALUES.tobytes()
    left = [path for path in tmp_path.iterdir() if path not in (store.path, tmp_path / ".mine.lock")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in left] == [0o600]  # the new state, whole, is for no one else
    store.close()

    Store(tmp_path, "mine").write(state_of(-VALUES, step=4))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.lock", "mine.adapter"]


def test_leftovers_of_another_name_are_not_touched(tmp_path: Path) -> None:
    for name in (".mine2.adapter.abcdefgh", ".mine.adapter.x.adapter", "mine.adapter.abcdefgh"):
        (tmp_path / name).write_text("")
    Store(tmp_path, "mine")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_writer_killed_at_any_time_leaves_a_whole_state(tmp_path: Path) -> None:
    path = tmp_path / "mine.adapter"
    write_state(path, state_of(np.zeros(1 << 16, np.float32), step=0))

    def write_forever() -> None:
        step = 0
        while True:
            step += 1
            write_state(path, state_of(np.full(1 << 16, step, np.float32), step=step))

    steps = []
    for wait_s in (0.05, 0.08, 0.11, 0.14):
        child = child_of(write_forever)
        child.join(wait_s)
        child.kill()
        child.join()
        found = read_state(path)
        step = int(found.config_records["progress"]["step"])
        assert (values_of(found) == step).all()
        steps.append(step)
    assert max(steps) > 1  # it did write


# -- passphrase -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sealed") / "mine.adapter"
    write_state(path, state_of(), Seal(PASSPHRASE))
    return path.read_bytes()


def test_a_sealed_file_shows_nothing(sealed: bytes) -> None:
    assert sealed.startswith(SEALED)
    for plain in (VALUES.tobytes(), VALUES[0, :4].tobytes(), b"m.0.weight", b"model_hash", b"adapter"):
        assert plain not in sealed.removeprefix(SEALED)


def test_the_same_state_is_sealed_differently_every_time(tmp_path: Path) -> None:
    seal = Seal(PASSPHRASE)
    write_state(tmp_path / "a", state_of(), seal)
    write_state(tmp_path / "b", state_of(), seal)
    a, b = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    assert len(a) == len(b)
    same = sum(x == y for x, y in zip(a, b, strict=True)) - len(SEALED) - 16  # the magic, and the salt of one Seal
    assert same < 0.05 * len(a)


def test_a_wrong_passphrase_is_refused(tmp_path: Path, sealed: bytes) -> None:
    (tmp_path / "mine.adapter").write_bytes(sealed)
    with pytest.raises(StoreError, match="passphrase is wrong"):
        Store(tmp_path, "mine", "Correct horse").read()


def test_a_missing_passphrase_is_asked_for(tmp_path: Path, sealed: bytes) -> None:
    (tmp_path / "mine.adapter").write_bytes(sealed)
    with pytest.raises(StoreError, match="pass passphrase="):
        Store(tmp_path, "mine").read()


def test_an_empty_passphrase_is_refused_and_never_no_encryption(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="empty"):
        Store(tmp_path, "mine", "")
    with pytest.raises(StoreError, match="empty"):
        Seal("")


def test_a_passphrase_for_a_plain_file_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path / "mine.adapter", state_of())
    with pytest.raises(StoreError, match="not encrypted"):
        Store(tmp_path, "mine", PASSPHRASE).read()


@pytest.mark.parametrize("part", ["salt", "nonce", "first byte", "middle", "tag", "cut", "extended"])
def test_a_sealed_file_that_was_touched_is_refused(tmp_path: Path, sealed: bytes, part: str) -> None:
    start = len(SEALED)
    at = {"salt": start, "nonce": start + 16, "first byte": start + 28, "middle": len(sealed) // 2, "tag": -1}
    damaged = bytearray(sealed)
    if part in at:
        damaged[at[part]] ^= 1
    elif part == "cut":
        del damaged[-1]
    else:
        damaged += b"\0"
    (tmp_path / "mine.adapter").write_bytes(damaged)
    with pytest.raises(StoreError, match="damaged"):
        Store(tmp_path, "mine", PASSPHRASE).read()


# -- two processes ----------------------------------------------------------------------------------------------------


def test_two_processes_cannot_share_a_name(tmp_path: Path) -> None:
    holder = child_of(lambda: (Store(tmp_path, "mine"), (tmp_path / "held").touch(), signal.pause()))
    try:
        while not (tmp_path / "held").exists():
            assert holder.is_alive()
        with pytest.raises(StoreError, match="another process"):
            Store(tmp_path, "mine")
        Store(tmp_path, "yours").close()
    finally:
        holder.kill()
        holder.join()
    Store(tmp_path, "mine").close()  # a killed process holds nothing


def test_a_closed_store_can_be_opened_again(tmp_path: Path) -> None:
    Store(tmp_path, "mine").close()
    Store(tmp_path, "mine").close()


# -- full disk --------------------------------------------------------------------------------------------------------


@contextmanager
def limited_files(tmp_path: Path, most: int = 1 << 17) -> Iterator[Path]:
    """A folder on a disk where no file may be longer than 128 KiB, by the kernel's limit for this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield tmp_path
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "privatelora-test", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("disk", [limited_files, small_disk])
@pytest.mark.parametrize("passphrase", [None, PASSPHRASE], ids=["plain", "sealed"])
def test_a_full_disk_keeps_the_old_state(
    tmp_path: Path, disk: Callable[[Path], AbstractContextManager[Path]], passphrase: str | None
) -> None:
    with disk(tmp_path) as folder:
        store = Store(folder, "mine", passphrase)
        store.write(state_of())
        with pytest.raises(StoreError, match="last saved state is still there"):
            store.write(state_of(np.zeros(TOO_MUCH, np.float32)))
        assert values_of(store.read()).tobytes() == VALUES.tobytes()
        assert sorted(path.name for path in folder.iterdir()) == [".mine.lock", "mine.adapter"]
        store.write(state_of(-VALUES))  # room again
        assert values_of(store.read()).tobytes() == (-VALUES).tobytes()
        store.close()


@pytest.mark.parametrize("disk", [limited_files, small_disk])
def test_a_device_whose_disk_is_full_keeps_its_adapter_in_memory(
    tmp_path: Path, fleet: Fleet, disk: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    full, roomy = tmp_path / "full", tmp_path / "roomy"
    full.mkdir()
    fleet.service("llama")
    settings = {"placement": "paper", "rank": (64, 32)}  # more than the disk has room for
    with ExitStack() as running:
        with disk(full):
            me = running.enter_context(fleet.session("llama", store_dir=full, **settings))
            with pytest.raises(StoreError, match="Free space"):
                me.finetune(["some text to learn", "and some more of it"], epochs=1, batch_size=1)
            assert any(bool(parameter.any()) for parameter in me.adapter.parameters())  # its first step was taken
            text = me.generate("one two", max_new_tokens=10)
        me.save(tmp_path / "elsewhere")
        other = running.enter_context(fleet.session("llama", store_dir=roomy, **settings))
        assert other.generate("one two", max_new_tokens=10) != text
        other.load(tmp_path / "elsewhere")
        assert other.generate("one two", max_new_tokens=10) == text


@pytest.mark.parametrize(
    "disk", [partial(limited_files, most=1 << 15), small_disk], ids=["limited_files", "small_disk"]
)
def test_a_full_disk_keeps_no_half_of_a_download(
    tmp_path: Path, fleet: Fleet, disk: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    fleet.service("llama")
    with disk(tmp_path) as folder:
        with pytest.raises(StoreError, match="free space there, or set PRIVATELORA_CACHE_DIR"):
            fleet.session("llama", placement="first=2,last=2", cache_dir=folder / "cache")
        parts = list((folder / "cache" / "blobs").iterdir())
        assert all(len(part.name) == 64 for part in parts)  # whole ones, by their hash
        assert all(hashlib.sha256(part.read_bytes()).hexdigest() == part.name for part in parts)


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "mine.adapter"
    write_state(path, state_of())
    return path.read_bytes()


def assert_refused_or_whole(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with suppress(StoreError):
        found = read_state(path)
        with suppress(ConfigurationError):  # whole, but of a kind that this release does not know
            Identity.from_record(found.config_records["identity"])


@same_folder
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_is_refused(tmp_path: Path, whole: bytes, share: float) -> None:
    path = tmp_path / "mine.adapter"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(StoreError, match=r"not a saved adapter|does not say"):
        read_state(path)


@same_folder
@given(content=st.binary(max_size=200))
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.adapter"
    path.write_bytes(content)
    with pytest.raises(StoreError):
        read_state(path)


@same_folder
@given(damage=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_file_raises_store_errors_only(tmp_path: Path, whole: bytes, damage: list[tuple[int, int]]) -> None:
    damaged = bytearray(whole)
    for at, value in damage:
        damaged[at % len(whole)] = value
    assert_refused_or_whole(tmp_path / "mine.adapter", bytes(damaged))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.just("json"), inner, max_size=3)
    ),
    max_leaves=8,
)


@same_folder
@given(
    header=st.one_of(
        json_values,
        st.fixed_dictionaries({"__metadata__": json_values}),
        st.fixed_dictionaries(
            {
                "__metadata__": st.fixed_dictionaries(
                    {
                        "format": st.just("privatelora-adapter-1"),
                        "configs": st.one_of(
                            json_values.map(json.dumps),
                            st.fixed_dictionaries({"identity": json_values}).map(json.dumps),
                            st.fixed_dictionaries({"json": json_values.map(json.dumps)}).map(
                                lambda identity: json.dumps({"identity": identity, "progress": {}})
                            ),
                        ),
                    }
                )
            }
        ),
    )
)
def test_a_file_whose_header_says_anything_else_raises_store_errors_only(tmp_path: Path, header: object) -> None:
    encoded = json.dumps(header).encode()
    assert_refused_or_whole(tmp_path / "mine.adapter", len(encoded).to_bytes(8, "little") + encoded)


def test_a_file_of_a_newer_release_is_named(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "mine.adapter"
    path.write_bytes(whole.replace(b"privatelora-adapter-1", b"privatelora-adapter-9"))
    with pytest.raises(StoreError, match=r"privatelora-adapter-9.*reads privatelora-adapter-1"):
        read_state(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nothing\.adapter.*check the path"):
        read_state(tmp_path / "nothing.adapter")
