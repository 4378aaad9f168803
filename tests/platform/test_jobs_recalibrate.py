"""`adapter-recalibrate` makes another set from other passages, beside those that there are, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.servers import ValkeyServer
from tests.support.tiny import tiny_model

from privatelora.cloud.backbone import Backbone
from privatelora.platform import valkey as valkeys
from privatelora.platform.audit import SERVICE
from privatelora.platform.database import Database
from privatelora.platform.jobs import machine
from privatelora.platform.jobs.runner import Services, run_next
from privatelora.platform.settings import load_settings
from privatelora.platform.tables import Job


def test_it_publishes_another_set_that_becomes_the_default(tmp_path: Path, valkey: ValkeyServer) -> None:
    model, data_dir = tmp_path / "model", tmp_path / "data"
    tiny_model("llama", model)
    backbone = Backbone.load(model, data_dir)
    before = backbone.default_sets["calibrated"]
    database = Database(f"sqlite:///{tmp_path}/control.db")
    database.upgrade()
    settings = load_settings({"model": str(model), "data_dir": data_dir, "job_lease_s": 30.0})
    with database.write() as session:
        job = machine.queue(session, SERVICE, "adapter-recalibrate", {"seed": 7, "max_rank": 8})
    assert job is not None
    run_next(Services(settings, database, valkeys.connect(valkey.url), "worker"))
    with database.read() as session:
        done = session.get_one(Job, job.id)
    assert (done.state, done.error) == ("done", None)
    assert done.result is not None
    assert (done.result["max_rank_down"], done.result["max_rank_up"]) == (8, 8)
    after = backbone.default_sets["calibrated"]  # which a running backbone announces
    assert after != before
    assert {before, after} <= {info.sha256 for info in backbone.set_infos()}
    database.close()
    assert "privatelora.platform.recalibrate" not in sys.modules
