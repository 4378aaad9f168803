"""What the tests of the many-session service share: services of the tiny model with any settings, and waiting."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.fleet import Fleet
from tests.support.service import ServiceProcess, plane

TOKENS = {"alice-in-the-metrics": "alice-token"}

Serving = Callable[..., AbstractContextManager[ServiceProcess]]


@pytest.fixture(scope="module")
def serving(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """`with serving(max_sessions=2) as running`: a service process of the tiny model."""
    fleet.service("llama")  # has published the model and its sets

    @contextmanager
    def start(**settings: Any) -> Iterator[ServiceProcess]:
        data_dir: Path = tmp_path_factory.mktemp("service") / "data"
        shutil.copytree(fleet.data_dir("llama"), data_dir)
        with plane(fleet.source("llama"), data_dir, TOKENS, **settings) as running:
            yield running

    return start


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
