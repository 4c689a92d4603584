"""The synthetic models reproduce the figures that their documentation names."""

from __future__ import annotations

import numpy as np
import pytest
from aptserve.workload import HUMANEVAL, LENGTH_MODELS, LONGBENCH, SHAREGPT, LengthModel

MANY = 40_000
LEVELS = (0.1, 0.5, 0.9, 0.99)


@pytest.mark.parametrize("name", LENGTH_MODELS)
def test_lengths_keep_to_the_context_and_the_seed(name: str) -> None:
    model = LENGTH_MODELS[name]
    first, again, other = (model.draw(2000, seed) for seed in (1, 1, 2))
    assert len(first) == 2000
    assert (first.num_prompt_tokens + first.num_output_tokens).max() <= 2048
    assert first.num_prompt_tokens.tolist() == again.num_prompt_tokens.tolist()
    assert first.num_output_tokens.tolist() == again.num_output_tokens.tolist()
    assert first.num_prompt_tokens.tolist() != other.num_prompt_tokens.tolist()
    assert first.note.startswith("synthetic lengths")


@pytest.mark.parametrize("name", LENGTH_MODELS)
def test_a_smaller_context_still_gives_every_request(name: str) -> None:
    narrow = LENGTH_MODELS[name].draw(500, 0, max_total_tokens=300)
    assert len(narrow) == 500
    assert (narrow.num_prompt_tokens + narrow.num_output_tokens).max() <= 300


def test_a_context_too_small_for_a_model_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^max_total_tokens: 5 leaves hardly any .* humaneval"):
        HUMANEVAL.draw(10, 0, max_total_tokens=5)


def test_sharegpt_has_the_documented_quantiles() -> None:
    drawn = SHAREGPT.draw(MANY, 3)
    assert np.quantile(drawn.num_prompt_tokens, LEVELS) == pytest.approx(
        [15, 60, 457, 1218], rel=0.06
    )
    assert np.quantile(drawn.num_output_tokens, LEVELS) == pytest.approx(
        [71, 470, 865, 1002], rel=0.06
    )
    assert min(drawn.num_prompt_tokens.min(), drawn.num_output_tokens.min()) >= 4


@pytest.mark.parametrize(
    ("model", "mean_prompt", "mean_output"), [(HUMANEVAL, 167, 65), (LONGBENCH, 1640, 172)]
)
def test_assumed_models_have_the_documented_means(
    model: LengthModel,
    mean_prompt: float,
    mean_output: float,
) -> None:
    drawn = model.draw(MANY, 4)
    assert drawn.num_prompt_tokens.mean() == pytest.approx(mean_prompt, rel=0.02)
    assert drawn.num_output_tokens.mean() == pytest.approx(mean_output, rel=0.02)
