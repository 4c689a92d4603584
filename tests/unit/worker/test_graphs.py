"""Decode steps padded to fixed shapes, run without recording: the same tokens as ``generate()``."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from aptserve_worker.engine import ModelEngine
from aptserve_worker.model.graphs import CudaRecorder, DecodeGraphs
from aptserve_worker.plan import Tier
from support.engines import Driver, make_engine
from support.models import VOCAB, greedy
from transformers import PreTrainedModel

Checkpoint = Callable[[str], Path]
Oracles = Callable[[str], PreTrainedModel]


def make(checkpoint: Checkpoint, name: str, **changes: Any) -> ModelEngine:
    return make_engine(checkpoint(name), **{"graphs": "eager", "max_num_seqs": 12, **changes})


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 20))] for _ in range(count)]


class Spy:
    """Counts steps that a recorded one served."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        run = DecodeGraphs.run

        def watched(graphs: DecodeGraphs, parts: Any) -> Any:
            result = run(graphs, parts)
            if result is not None:
                self.rows.append(len(parts))
            return result

        monkeypatch.setattr(DecodeGraphs, "run", watched)


@pytest.mark.parametrize("name", ["opt", "llama", "llama-grouped", "gemma2", "mistral-window"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_tokens_are_those_of_generate(
    name: str,
    kernels: str,
    checkpoint: Checkpoint,
    oracle: Oracles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make(checkpoint, name, kernels=kernels)
    spy = Spy(monkeypatch)
    driver = Driver(engine)
    tiers = [t.tier for t in engine.info.tiers]
    ids, batch = [], prompts(7)
    for i, prompt in enumerate(batch):  # join one after the other: other numbers of rows each time
        ids.append(driver.add(prompt, tier=tiers[i % len(tiers)], max_tokens=3 + i))
        driver.step()
        driver.step()
    if Tier.HIDDEN in tiers:
        driver.step(promote=[s for s in ids[1::2] if s not in driver.finished][:1])
    driver.run()
    for i, (sequence, prompt) in enumerate(zip(ids, batch, strict=True)):
        assert driver.output(sequence) == greedy(oracle(name), prompt, 3 + i)
    assert len(set(spy.rows)) > 2
    driver.engine.release(ids)


def test_a_row_that_changes_hands_leaves_nothing_behind(
    checkpoint: Checkpoint, oracle: Oracles
) -> None:
    engine = make(checkpoint, "opt", max_num_seqs=2, pool_units=40)
    for round_, prompt in enumerate(prompts(6)):
        driver = Driver(engine)
        tier = (Tier.KV, Tier.HIDDEN)[round_ % 2]
        sequence = driver.add(prompt, tier=tier, max_tokens=5)
        driver.run()
        assert driver.output(sequence) == greedy(oracle("opt"), prompt, 5)
        engine.release([sequence])
    assert engine.allocator.num_free == engine.allocator.num_units


def test_prompts_and_chunks_go_their_own_way(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(checkpoint, "opt")
    spy = Spy(monkeypatch)
    driver = Driver(engine)
    sequence = driver.add([5, 6, 7, 8], max_tokens=3)
    driver.step({sequence: 2})
    driver.step({sequence: 1})  # one token, but not the last one known
    driver.step({sequence: 1})
    assert spy.rows == [1]


def test_more_tiers_than_a_recorded_step_has(checkpoint: Checkpoint) -> None:
    engine = make(checkpoint, "opt", tiers="kv,hidden,kv8")
    driver = Driver(engine)
    ids = [driver.add([5, 6, 7], tier=tier, max_tokens=3) for tier in Tier]
    driver.run()
    assert [len(driver.output(sequence)) for sequence in ids] == [3, 3, 3]


@pytest.mark.parametrize("max_num_seqs", [1, 5, 12, 40])
def test_every_batch_of_two_tiers_has_a_step_and_no_step_is_for_none(
    max_num_seqs: int, checkpoint: Checkpoint
) -> None:
    graphs = make(checkpoint, "opt", max_num_seqs=max_num_seqs)._graphs
    assert graphs is not None
    wanted = {
        graphs._shape_for({t: n for t, n in ((Tier.KV, kv), (Tier.HIDDEN, hidden)) if n})
        for kv in range(max_num_seqs + 1)
        for hidden in range(max_num_seqs + 1 - kv)
        if kv + hidden
    }
    assert set(graphs._steps) == wanted


def test_steps_leave_their_logits_in_one_place(checkpoint: Checkpoint) -> None:
    graphs = make(checkpoint, "opt")._graphs
    assert graphs is not None
    logits = [step.replay() for step in graphs._steps.values()]
    assert len({tensor.data_ptr() for tensor in logits}) == 1
    assert max(map(len, logits)) == max(sum(n for _, n in shape) for shape in graphs._steps)


class FakeCuda:
    """Writes down what a recorder does with torch's CUDA functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recordings: list[tuple[object, bool]] = []
        """Of each its stream, and whether inference mode was on when it began."""
        self.streams: list[object] = []
        """The current one comes last."""
        for name in ("graph_pool_handle", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda: self)
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.streams[-1])
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        self.sync_mode: int | str = 0
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.sync_mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_sync_mode)
        self.streams.append(FakeStream())

    def set_sync_mode(self, mode: int | str) -> None:
        self.sync_mode = mode

    def replay(self) -> None:
        """Of a graph."""

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        depth = len(self.streams)
        self.streams.append(stream)
        try:
            yield
        finally:
            del self.streams[depth:]

    @contextmanager
    def graph(self, graph: object, pool: object, stream: object) -> Iterator[None]:
        """As torch's, which leaves its stream the current one where a recording fails."""
        self.recordings.append((stream, torch.is_inference_mode_enabled()))
        self.streams.append(stream)
        yield
        self.streams.pop()


class FakeStream:
    def wait_stream(self, stream: object) -> None:
        """Of a stream."""


def test_recordings_share_a_stream_and_begin_outside_of_inference_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = CudaRecorder()
    runs: list[tuple[object, bool]] = []

    def step() -> torch.Tensor:
        runs.append((cuda.streams[-1], torch.is_inference_mode_enabled()))
        return torch.zeros(1)

    replays = [recorder(step), recorder(step)]
    assert replays[0]() is not replays[1]()
    (stream,) = {stream for stream, _ in (*cuda.recordings, *runs)}
    assert stream is not cuda.streams[-1]
    assert [is_inference for _, is_inference in cuda.recordings] == [False, False]
    # The first one twice before it is recorded: once to compile, once to see that nothing waits.
    assert [is_inference for _, is_inference in runs] == [True] * 5


def test_a_recording_that_fails_leaves_the_stream_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    before = list(cuda.streams)
    runs: list[None] = []

    def step() -> torch.Tensor:
        runs.append(None)
        if len(runs) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="capturing"):
        CudaRecorder()(step)
    assert cuda.streams == before


def test_a_step_that_waits_for_the_device_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)

    def step() -> torch.Tensor:
        if cuda.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaRecorder()(step)
    assert cuda.recordings == []
    assert cuda.sync_mode == 0
