"""The readers and the ShareGPT model against published data, where a machine has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from aptserve.workload import SHAREGPT, Lengths, Trace, read_servegen, read_workload
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def cv_of_gaps(trace: Trace) -> float:
    gaps = np.diff(trace.arrival_seconds)
    return float(gaps.std() / gaps.mean())


def rank_correlation(a: Ints, b: Ints) -> float:
    """Spearman's, up to the order of ties."""
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1]).item(0, 1))


def first_turns(turns: Lengths) -> tuple[Ints, Ints]:
    """Prompts and answers of first turns as the paper takes them from ShareGPT.

    A row whose input does not hold the row before, with its answer, starts a conversation.
    """
    prompts, outputs = turns.num_prompt_tokens, turns.num_output_tokens
    totals = prompts + outputs
    chosen = np.concatenate([[True], prompts[1:] < totals[:-1]])
    chosen &= (prompts >= 4) & (outputs >= 4) & (totals <= 2048)
    return prompts[chosen], outputs[chosen]


@pytest.mark.parametrize(
    ("file", "num_requests", "rate", "mean_prompt", "mean_output"),
    [
        ("azure_llm_2023_code.csv", 8_819, 2.567, 2048, 28),
        ("mooncake_conversation_lengths.csv", 12_031, 3.401, 12_035, 343),
        ("mooncake_conversation_blocks.jsonl", 12_031, 3.401, 12_035, 343),
        ("sharegpt_turns_8k_lengths.csv", 30_731, None, 2340, 439),
        ("arxiv_summarization_lengths.csv", 28_257, None, 2588, 291),
    ],
)
def test_a_file_has_the_published_figures(
    public_traces: Path,
    file: str,
    num_requests: int,
    rate: float | None,
    mean_prompt: float,
    mean_output: float,
) -> None:
    requests = read_workload(public_traces / file)
    assert len(requests) == num_requests
    assert requests.num_prompt_tokens.mean() == pytest.approx(mean_prompt, abs=1)
    assert requests.num_output_tokens.mean() == pytest.approx(mean_output, abs=1)
    if rate is None:
        assert isinstance(requests, Lengths)
    else:
        assert isinstance(requests, Trace)
        assert requests.rate == pytest.approx(rate, rel=2e-3)


def test_code_requests_come_in_bursts(public_traces: Path) -> None:
    trace = read_workload(public_traces / "azure_llm_2023_code.csv")
    assert isinstance(trace, Trace)
    assert cv_of_gaps(trace) == pytest.approx(13.15, abs=0.01)


def test_ticks_are_no_bursts(public_traces: Path) -> None:
    trace = read_workload(public_traces / "mooncake_conversation_blocks.jsonl")
    assert isinstance(trace, Trace)
    assert cv_of_gaps(trace) < 1
    assert "1,180 ticks" in trace.note


def test_servegen_clients_send_at_their_rates(public_traces: Path) -> None:
    trace = read_servegen(public_traces, seed=1, duration_seconds=60)
    assert trace.rate == pytest.approx(290, rel=0.1)  # of all clients in the first window
    assert len(set(trace.tenants)) > 10


def test_the_sharegpt_model_fits_first_turns(public_traces: Path) -> None:
    turns = read_workload(public_traces / "sharegpt_turns_8k_lengths.csv")
    assert isinstance(turns, Lengths)
    prompts, outputs = first_turns(turns)
    drawn = SHAREGPT.draw(100_000, 1)
    levels = (0.1, 0.5, 0.9, 0.99)
    for model, data in ((drawn.num_prompt_tokens, prompts), (drawn.num_output_tokens, outputs)):
        assert np.quantile(model, levels) == pytest.approx(np.quantile(data, levels), rel=0.03)
        assert model.mean() == pytest.approx(data.mean(), rel=0.02)
        assert model.std() == pytest.approx(data.std(), rel=0.02)
    fitted = rank_correlation(drawn.num_prompt_tokens, drawn.num_output_tokens)
    assert fitted == pytest.approx(rank_correlation(prompts, outputs), abs=0.02)
