"""A crowd on a real service, for a minute and a half: 200 devices come and go, and every promise of the soak is kept.

`make soak` does the same for ten minutes; `tests/soak/` has what it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.service import REPOSITORY

SECONDS, SESSIONS = 90, 200
RSS_RATIO = 1.05
LEFT = ("sessions_left", "memory_bytes_in_use", "files_left", "service_failures")
PATIENCE_S = 240  # on a machine that has more to do


@pytest.mark.timeout(PATIENCE_S + 60)
def test_two_hundred_devices_come_and_go_and_nothing_is_lost_or_left(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.soak", "--seconds", str(SECONDS), "--sessions", str(SESSIONS)]
    soak = subprocess.Popen(
        [*command, "--output", str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said, _ = soak.communicate(timeout=PATIENCE_S)
    finally:
        soak.terminate()  # which takes its service with it
        soak.wait()
    assert (tmp_path / "report.json").exists(), said.decode()
    report = json.loads((tmp_path / "report.json").read_text())
    keys = ("sessions", "misbehaved", "rss_ratio", "blocks_in_use", "lost_steps", "uncoded_refusals", "seconds")
    assert tuple(report)[: len(keys)] == keys
    assert (report["sessions"], report["misbehaved"]) == (SESSIONS, SESSIONS // 10)
    for name in ("blocks_in_use", "lost_steps", "uncoded_refusals", *LEFT):
        assert report[name] == 0, said.decode()
    assert report["steps"] >= SESSIONS * 9 // 10  # each honest one did something
    assert {"protocol", "connection_lost"} <= report["refusals"].keys()
    assert report["replayed"]
    assert not report["problems"], said.decode()
    assert report["rss_ratio"] <= RSS_RATIO, said.decode()
