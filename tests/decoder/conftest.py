"""Tiny models for the decoder's tests, made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.layers import TinyLayers, tiny_layers


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyLayers]:
    """The layers of a tiny model by the model's name."""
    loaded: dict[str, TinyLayers] = {}

    def layers(name: str) -> TinyLayers:
        if name not in loaded:
            loaded[name] = tiny_layers(name, tmp_path_factory.mktemp(name))
        return loaded[name]

    return layers
