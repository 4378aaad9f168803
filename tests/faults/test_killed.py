"""SIGKILL: of the service, which comes back while devices wait; of the device, which goes on from its last step.

Float32 and one thread: what is left behind is compared bit for bit with an undisturbed run.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.children import child_of
from tests.support.fleet import Fleet
from tests.support.proxy import Proxy, nth
from tests.support.service import ServiceProcess, service

from privatelora.device import DeviceSession, StepRecord
from privatelora.protocol.frames import Kind, Phase

ROWS = [
    {"prompt": f"The nickname of colleague {number} is", "completion": f" Captain {'abcdef'[number]}."}
    for number in range(6)
]
PLACEMENT = "first=1,last=1,inline=2+3"
RECIPE = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2, "seed": 3}  # six steps
PROMPT = "The nickname of"


@pytest.fixture(scope="module")
def running(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service of its own, to be killed."""
    fleet.service("llama")  # has published the model and its sets, which need not be made again
    data_dir = tmp_path_factory.mktemp("killed") / "data"
    shutil.copytree(fleet.data_dir("llama"), data_dir)
    with service(fleet.source("llama"), data_dir) as started:
        yield started


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service takes some five seconds to come back; devices look for it more often than every five seconds."""
    monkeypatch.setattr("privatelora.device.replay.LONGEST_WAIT_S", 0.5)


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> tuple[dict[str, np.ndarray], list[float], str]:
    """State, losses and text of a run that nothing happened to, at the service that lives."""
    with fleet.session("llama", placement=PLACEMENT, rank=8) as me:
        losses = [record.loss for record in me.finetune(ROWS, **RECIPE).history]
        return arrays_of(me), losses, me.generate(PROMPT, max_new_tokens=16)


def test_a_service_killed_in_training_costs_no_step(
    fleet: Fleet, running: ServiceProcess, undisturbed: tuple[dict[str, np.ndarray], list[float], str]
) -> None:
    expected, losses, _ = undisturbed
    with Revival(running) as dying, Proxy(running.port) as proxy:
        proxy.cut(nth(1, Kind.HIDDEN, Phase.TRAIN, up=True), then=dying)  # before its first frame
        proxy.cut(nth(3, Kind.DELTA, Phase.TRAIN, layer=3), then=dying)  # in the forward pass of step 3
        proxy.cut(nth(5, Kind.GRAD_ENCODED, layer=2), then=dying)  # in the backward pass of step 5
        with device(fleet, running, proxy.url) as me:
            history = me.finetune(ROWS, **RECIPE).history
            found = arrays_of(me)
        assert not proxy.faults_left
    assert dying.deaths == 3
    assert [record.loss for record in history] == losses
    assert_same(found, expected)


def test_a_service_killed_in_generation_costs_no_token(
    fleet: Fleet, running: ServiceProcess, undisturbed: tuple[dict[str, np.ndarray], list[float], str]
) -> None:
    _, _, text = undisturbed
    with Revival(running) as dying, Proxy(running.port) as proxy, device(fleet, running, proxy.url) as me:
        me.finetune(ROWS, **RECIPE)
        proxy.cut(nth(1, Kind.ENCODED, Phase.GENERATE, layer=3), then=dying)  # in the prefill
        proxy.cut(nth(9, Kind.DELTA, Phase.GENERATE, layer=3), then=dying)  # in a token
        assert me.generate(PROMPT, max_new_tokens=16) == text
        assert not proxy.faults_left
    assert dying.deaths == 2


def test_a_service_killed_between_two_steps_or_two_tokens_costs_none(
    fleet: Fleet, running: ServiceProcess, undisturbed: tuple[dict[str, np.ndarray], list[float], str]
) -> None:
    expected, _, text = undisturbed
    with Revival(running) as dying, device(fleet, running, running.url) as me:

        def die_after_step_3(record: StepRecord) -> None:
            if record.step == 3:
                dying()

        me.finetune(ROWS, callbacks=[die_after_step_3], **RECIPE)
        assert_same(arrays_of(me), expected)
        stream = me.stream(PROMPT, max_new_tokens=16)
        begun = next(stream) + next(stream)
        dying()
        assert begun + "".join(stream) == text
    assert dying.deaths == 2


def test_a_killed_device_goes_on_from_its_last_step(
    fleet: Fleet, tmp_path: Path, undisturbed: tuple[dict[str, np.ndarray], list[float], str]
) -> None:
    expected, losses, text = undisturbed
    home = fleet.service("llama")

    def train_and_be_killed(url: str) -> None:
        with device(fleet, home, url, store_dir=tmp_path) as me:
            me.finetune(ROWS, resume=True, **RECIPE)

    with Proxy(home.port) as proxy:
        child = child_of(lambda: train_and_be_killed(proxy.url))
        proxy.cut(nth(3, Kind.GRAD_DELTA, layer=3), then=child.kill)  # in the backward pass of step 3
        child.join(60)
        assert not proxy.faults_left
        child = child_of(lambda: train_and_be_killed(proxy.url))
        proxy.cut(nth(3, Kind.HIDDEN, Phase.TRAIN, up=True), then=child.kill)  # two steps on, at the begin of step 5
        child.join(60)
        assert not proxy.faults_left
    with device(fleet, home, home.url, store_dir=tmp_path) as me:
        report = me.finetune(ROWS, resume=True, **RECIPE)
        assert [record.step for record in report.history] == [5, 6]
        assert [record.loss for record in report.history] == losses[4:]
        assert_same(arrays_of(me), expected)
        assert me.generate(PROMPT, max_new_tokens=16) == text


class Revival:
    """Kills a service and brings it back behind the device's back; at the end of the block it lives."""

    def __init__(self, running: ServiceProcess) -> None:
        self.running, self.deaths = running, 0
        self._threads = ExitStack()

    def __enter__(self) -> Revival:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.close()

    def __call__(self) -> None:
        self.deaths += 1
        self.running.kill()
        revival = threading.Thread(target=self.running.start)
        revival.start()
        self._threads.callback(revival.join)


def device(fleet: Fleet, running: ServiceProcess, url: str, **settings: Any) -> DeviceSession:
    places = {"store_dir": tempfile.mkdtemp(dir=fleet.folder), "cache_dir": fleet.folder / "cache"}
    return DeviceSession(url, token=running.token, placement=PLACEMENT, rank=8, **(places | settings))


def arrays_of(me: DeviceSession) -> dict[str, np.ndarray]:
    """The adapter and the optimizer's moments, by record and name."""
    found = {
        f"{record}/{name}": array.numpy()
        for record, arrays in me.state().array_records.items()
        for name, array in arrays.items()
    }
    assert any(name.startswith("exp_avg_sq/") for name in found)
    assert any(name.startswith("adapter/lora.0") for name in found)
    assert any(name.startswith("adapter/m.2") and array.any() for name, array in found.items())
    return found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name].tobytes() != expected[name].tobytes()] == []


def test_the_runs_of_these_tests_train_every_part(
    undisturbed: tuple[dict[str, np.ndarray], list[float], str],
) -> None:
    arrays, losses, _ = undisturbed
    assert losses[-1] < losses[0]
    assert [name for name, array in arrays.items() if not np.any(array)] == []
