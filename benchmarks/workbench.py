"""What the rows of one run share: services in processes of their own, device sessions, and transformers' model.

Everything lies in one temporary folder and is made anew each run, so that no figure depends on what an earlier version
left behind; the adapter sets are computed once and serve both dtypes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import ENVIRONMENT
from benchmarks.rows import Unmeasured
from privatelora.device import DeviceSession
from privatelora.platform.models import BUNDLED, source_of

if TYPE_CHECKING:
    from collections.abc import Iterator

STOP_S = 10.0  # what a service gets to end in before it is killed


@dataclass(frozen=True)
class Address:
    url: str
    token: str


class Workbench:
    """A context manager; services start when a row first asks for them and stop at its end."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.threads = torch.get_num_threads()
        self._stack = ExitStack()
        self._addresses: dict[str, Address] = {}
        self._models: dict[str, PreTrainedModel] = {}
        self._sessions = 0

    def __enter__(self) -> Self:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="privatelora-bench-")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def data_dir(self) -> Path:
        """Folder of the services: published weights and adapter sets."""
        return self.folder / "service"

    def say(self, text: str) -> None:
        """Report progress on stderr."""
        self.console.print(text, markup=False)

    @contextmanager
    def session(self, dtype: str, **settings: Any) -> Iterator[DeviceSession]:
        """A new device, without a past, connected to the service of that dtype."""
        at = self._address(dtype)
        self._sessions += 1
        with DeviceSession(
            at.url,
            token=at.token,
            name=f"bench-{self._sessions}",
            store_dir=self.folder / "store",
            cache_dir=self.folder / "cache",
            **settings,
        ) as session:
            yield session

    def transformers_model(self, dtype: str) -> PreTrainedModel:
        """transformers' own model with plain frozen weights of that dtype."""
        if dtype not in self._models:
            config, state = self._checkpoint
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="eager")
            model.load_state_dict(state)
            model.tie_weights()
            self._models[dtype] = model.eval().requires_grad_(False)
        return self._models[dtype]

    @cached_property
    def _checkpoint(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """Config and float32 weights, as transformers reads the GGUF file; the model that it makes calls itself
        quantized, which stands in the way of training, so a plain one is made of them."""
        self.say("transformers reads the model")
        path = Path(source_of(BUNDLED))
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config, read.state_dict()

    def _address(self, dtype: str) -> Address:
        if dtype not in self._addresses:
            self.say(f"starting the {dtype} service")
            self._addresses[dtype] = self._stack.enter_context(_service(dtype, self.data_dir, self.folder))
        return self._addresses[dtype]


@contextmanager
def _service(dtype: str, data_dir: Path, folder: Path) -> Iterator[Address]:
    """`privatelora backbone` on a free loopback port, as its own process."""
    log = folder / f"service-{dtype}.log"
    options = ["--port", "0", "--json", "--dtype", dtype, "--data-dir", str(data_dir), "--log-level", "warning"]
    command = [sys.executable, "-m", "privatelora.platform", "backbone", *options]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # one JSON line when it is ready, nothing if it ended
        if not line:
            raise Unmeasured(f"the {dtype} service did not start: {log.read_text()[-2000:].strip()}")
        ready = json.loads(line)
        yield Address(ready["url"], Path(ready["token_file"]).read_text().strip())
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
