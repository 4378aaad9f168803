"""The examples and the README's ten lines run as they stand, against a real service with the bundled model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.service import ServiceProcess, service
from tests.support.tiny import smollm2_path

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """SmolLM2 with its calibrated set, in bfloat16, as `privatelora up` would serve it."""
    with service(smollm2_path(), tmp_path_factory.mktemp("service"), dtype="bfloat16") as started:
        yield started


def run(script: str, folder: Path, running: ServiceProcess, *arguments: str) -> str:
    """Standard output of a Python script, run in `folder` as a device of its own."""
    environment = os.environ | {
        "PRIVATELORA_TOKEN": running.token,
        "PRIVATELORA_STORE_DIR": str(folder / "store"),
        "PRIVATELORA_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, "-c", script, running.url, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_does_what_it_says(example: Path, running: ServiceProcess, tmp_path: Path) -> None:
    out = run(example.read_text(), tmp_path, running, "my-adapter")
    if example.stem == "export_to_peft":
        assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    elif example.stem == "finetune_facts":
        assert "My cat is called Miso." in out
    elif example.stem == "training_loop":
        assert (tmp_path / "studio.adapter").is_file()
        assert "4417" in out.splitlines()[-1]
    else:
        pytest.fail(f"say here what {example.name} must show")


def test_the_ten_lines_of_the_readme_teach_the_name_of_the_cat(running: ServiceProcess, tmp_path: Path) -> None:
    [script] = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    out = run(script.replace("http://127.0.0.1:8765", running.url), tmp_path, running)
    assert out.splitlines()[-1].strip() == "Miso."
