"""Fixtures of the whole suite: `fleet`, the running services that tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from tests.support.fleet import Fleet

# A suite started in the background of a shell inherits an ignored SIGINT; the commands that tests interrupt would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("privatelora", deadline=None)  # the machine has more to do than one example
settings.load_profile("privatelora")


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """One real service a model, started at its first use; all stop with the test session."""
    torch.set_num_threads(1)  # device and service run at the same time, on as little as two cores
    with TemporaryDirectory(prefix="privatelora-tests-") as folder, Fleet(Path(folder)) as running:  # a gigabyte
        yield running
