"""What the rows of one run share: services in processes of their own, device sessions, and transformers' model.

Everything lies in one temporary folder and is made anew each run, so that no figure depends on what an earlier version
left behind; the adapter sets are computed once and serve both dtypes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import httpx2 as httpx
import torch  # before privatelora.device, whose settings for OpenMP would slow transformers' side
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import ENVIRONMENT
from benchmarks.rows import ROOT, Unmeasured
from privatelora.device import DeviceSession
from privatelora.platform.models import BUNDLED, source_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

STOP_S = 10.0  # what a service gets to end in before it is killed
MAX_SESSIONS = 160  # of each service: more than any row needs
PINGS = 10


@dataclass(frozen=True)
class Address:
    """Where a service is, and its process; `rtt_ms` is what was measured where there is a network between."""

    url: str
    token: str
    pid: int
    rtt_ms: float = 0.0


class Workbench:
    """A context manager; services start when a row first asks for them and stop at its end."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.threads = torch.get_num_threads()
        self._stack = ExitStack()
        self._addresses: dict[str, Address] = {}
        self._far: dict[tuple[str, float], Address] = {}
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

    @property
    def cache_dir(self) -> Path:
        """Folder of what devices download."""
        return self.folder / "cache"

    def say(self, text: str) -> None:
        """Report progress on stderr."""
        self.console.print(text, markup=False)

    @contextmanager
    def session(self, dtype: str, **settings: Any) -> Iterator[DeviceSession]:
        """A new device, without a past, connected to the service of that dtype."""
        at = self.address(dtype)
        self._sessions += 1
        with DeviceSession(
            at.url,
            token=at.token,
            name=f"bench-{self._sessions}",
            store_dir=self.folder / "store",
            cache_dir=self.cache_dir,
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

    def address(self, dtype: str) -> Address:
        """Where the service of that dtype is, which starts if it has not."""
        if dtype not in self._addresses:
            self.say(f"starting the {dtype} service")
            self._addresses[dtype] = self._stack.enter_context(service(dtype, self.data_dir, self.folder))
        return self._addresses[dtype]

    def far_address(self, dtype: str, rtt_ms: float) -> Address:
        """The same service, with a network of that round trip before it (`far.py`)."""
        if (dtype, rtt_ms) not in self._far:
            near = self.address(dtype)
            self._far[dtype, rtt_ms] = self._stack.enter_context(_proxy(near, rtt_ms))
        return self._far[dtype, rtt_ms]


@contextmanager
def service(dtype: str, data_dir: Path, folder: Path) -> Iterator[Address]:
    """`privatelora backbone` on a free loopback port, as its own process."""
    log = folder / f"service-{dtype}.log"
    options = ["--port", "0", "--json", "--dtype", dtype, "--data-dir", str(data_dir), "--log-level", "warning"]
    options += ["--max-sessions", str(MAX_SESSIONS)]
    command = [sys.executable, "-m", "privatelora.platform", "backbone", *options]
    with log.open("a") as stderr, process(command, stderr) as child:  # another of that name may be running
        assert child.stdout is not None
        line = child.stdout.readline()  # one JSON line when it is ready, nothing if it ended
        if not line:
            raise Unmeasured(f"the {dtype} service did not start: {log.read_text()[-2000:].strip()}")
        ready = json.loads(line)
        yield Address(ready["url"], Path(ready["token_file"]).read_text().strip(), child.pid)


@contextmanager
def _proxy(near: Address, rtt_ms: float) -> Iterator[Address]:
    """`far.py` before a service, as its own process."""
    options = ["--port", str(urlsplit(near.url).port), "--delay-ms", str(rtt_ms / 2)]
    with process([sys.executable, "-m", "benchmarks.far", *options], None) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise Unmeasured("the delaying proxy did not start")
        url = f"http://127.0.0.1:{json.loads(line)['port']}"
        added = _ping_s(url) - _ping_s(near.url)
        yield Address(url, near.token, near.pid, 1e3 * added)


def _ping_s(url: str) -> float:
    """Median seconds of a small request on an open connection."""
    seconds = []
    with httpx.Client(base_url=url) as client:
        for _ in range(1 + PINGS):
            started = time.perf_counter()
            client.get("/healthz").raise_for_status()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


@contextmanager
def process(
    command: list[str], stderr: IO[str] | None, environment: Mapping[str, str] = ENVIRONMENT
) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended at the end."""
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
