"""A real service in a process of its own, on a real socket: `service(...)` starts one and stops it.

    with service(model_dir, data_dir) as running:        # `privatelora backbone --json`, the command that operators run
        DeviceSession(running.url, token=running.token, ...)
        running.kill(); running.start()                  # SIGKILL, then again on the same port and folder

`plane(...)` starts the same data plane with what the command line has no option for (several users, small limits); see
`tests/support/plane.py`. Tests read memory and logs of either through `ServiceProcess`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_S = 120.0
BACKBONE = ("privatelora.platform", "backbone", "--json")
PLANE = ("tests.support.plane",)


@dataclass
class ServiceProcess:
    """One service process, which may die and come back at the same address.

    `url` and `token` are what a device needs, `ready` is all that it announced; `log` holds all that it ever printed.
    """

    module: tuple[str, ...]
    options: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    url: str = ""
    token: str = ""
    ready: dict[str, Any] = field(default_factory=dict)
    takes_port: bool = True
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def start(self) -> None:
        """Start the process, on the port that it had before if any, and wait until it serves."""
        with self.log.open("ab") as log:
            begun = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.module, *self.options, *(("--port", str(self.port)) * self.takes_port)],
                cwd=REPOSITORY,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        guard = threading.Timer(START_TIMEOUT_S, self.process.kill)
        guard.start()
        line = self.process.stdout.readline()
        guard.cancel()
        if not line:
            self.process.wait()
            raise RuntimeError(f"the service did not start:\n{self.log.read_bytes()[begun:].decode()}")
        self.ready = ready = json.loads(line)
        self.url = ready.get("url", "")
        self.token = Path(ready["token_file"]).read_text().strip() if ready.get("token_file") else self.token

    def kill(self) -> None:
        """SIGKILL: nothing is said to anyone, nothing is cleaned up."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, as an operator would; SIGKILL if that does not end it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def memory_bytes(self, peak: bool = False, part: str = "VmRSS") -> int:
        """Resident memory now, or the most since `forget_peak`; `part` RssAnon: its own, RssFile: mapped files."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        name = "VmHWM" if peak else part
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(name))

    def forget_peak(self) -> None:
        """Let the peak start from the present value."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@contextmanager
def service(
    model: Path, data_dir: Path, *options: str, dtype: str = "float32", environment: Mapping[str, str] | None = None
) -> Iterator[ServiceProcess]:
    """`privatelora backbone` for a model directory or file, with any of its `options`; one thread of torch."""
    given = ("--model", str(model), "--dtype", dtype, "--data-dir", str(data_dir), "--torch-threads", "1", *options)
    with running_process(BACKBONE, given, _log_of(data_dir), environment) as running:
        yield running


@contextmanager
def plane(
    model: Path, data_dir: Path, tokens: Mapping[str, str], dtype: str = "float32", **settings: Any
) -> Iterator[ServiceProcess]:
    """The data plane with several users, `tokens` by user name, and any field of `DataPlaneSettings`."""
    given = ("--model", str(model), "--dtype", dtype, "--data-dir", str(data_dir))
    given += ("--tokens", json.dumps(tokens), "--settings", json.dumps({"torch_threads": 1} | settings))
    with running_process(PLANE, given, _log_of(data_dir)) as running:
        running.token = next(iter(tokens.values()))
        yield running


@contextmanager
def running_process(
    module: tuple[str, ...],
    options: tuple[str, ...],
    log: Path,
    environment: Mapping[str, str] | None = None,
    takes_port: bool = True,
) -> Iterator[ServiceProcess]:
    """`python -m module options`, with `environment` in place of this process's settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PRIVATELORA_")}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    running = ServiceProcess(module, options, inherited | quiet | dict(environment or {}), log, takes_port=takes_port)
    try:
        running.start()
        yield running
    finally:
        if hasattr(running, "process"):
            running.stop()


def _log_of(data_dir: Path) -> Path:
    return data_dir.parent / f"{data_dir.name}.log"
