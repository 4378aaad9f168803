"""Fixtures of the whole suite: `fleet`, the running services that tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.support.fleet import Fleet


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One real service a model, started at its first use; all stop with the test session."""
    torch.set_num_threads(1)  # device and service run at the same time, on as little as two cores
    with Fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running
