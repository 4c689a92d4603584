"""``aptserve bench`` against a running service, and the simulator with what it measured."""

import json
from pathlib import Path

from aptserve.evaluation.files import load_evaluation
from aptserve.workload import load_workload
from aptserve_scheduler.core import Objectives, Tier
from aptserve_scheduler.sim import SimConfig, simulate
from aptserve_scheduler.sim.calibration import load_worker
from support.commands import StartUp, run_command

NUM_REQUESTS = 20


async def test_a_trace_is_served_and_then_simulated(start_up: StartUp, tmp_path: Path) -> None:
    up = await start_up("--policy", "fcfs")
    path = tmp_path / "run.json"
    what = ("--trace", "humaneval", "--rate", "100", "-n", str(NUM_REQUESTS), "--seed", "3")
    slo = ("--slo-ttft", "20s", "--slo-tbt", "20s")
    outcome = await run_command("bench", *what, *slo, "--json", str(path), "-a", up.address)
    assert outcome.code == 0, outcome.err
    assert "100.0 %" in outcome.out

    (report,) = load_evaluation(path).runs
    assert (report.cell.policy, report.cell.cv, report.seed) == ("fcfs", 1.0, 3)
    assert report.num_good == report.num_completed == NUM_REQUESTS
    assert report.num_steps is not None
    assert set(report.tier_shares) == {"kv", "hidden"}

    document = json.loads(path.read_text())
    (worker_status,) = document["workers"]
    worker = load_worker(path)
    assert worker.spec.num_units == worker_status["num_units"]
    assert [tier.tier for tier in worker.spec.tiers] == [Tier.KV, Tier.HIDDEN]
    trace = load_workload(**document["workload"])
    result = simulate(trace, SimConfig("fcfs", (worker,), Objectives(20.0, 20.0)))
    assert [r.num_output_tokens for r in result.records] == [
        record["num_output_tokens"] for record in document["records"]
    ]
    assert all(record.is_good for record in result.records)
