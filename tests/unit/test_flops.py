"""Useful FLOPs against the published arithmetic."""

import pytest

from albert.flops import step_flops
from albert.model_config import MODEL_PRESETS


@pytest.mark.parametrize(
    ("preset", "length", "gflops_per_token"),
    [
        ("base", 512, 0.570), ("large", 512, 1.967), ("xlarge", 512, 7.555), ("xxlarge", 512, 14.805),
        ("base", 128, 0.528), ("large", 128, 1.854), ("xlarge", 128, 7.329), ("xxlarge", 128, 14.579),
    ],
)  # fmt: skip
def test_flops_per_token(preset, length, gflops_per_token):
    config, sequences = MODEL_PRESETS[preset], 1000
    tokens = sequences * length
    preds = round(0.15 * tokens)
    flops = step_flops(
        config, tokens=tokens, sum_squared_lengths=sequences * length**2, sequences=sequences, preds=preds
    )
    # The published count has every token leave the last layer; here only those that a head uses do.
    unused = tokens - sequences - preds
    layer = 4 * config.hidden_size**2 + 4 * config.hidden_size * (config.intermediate_size + length)
    assert (flops + 3 * unused * layer) / tokens / 1e9 == pytest.approx(gflops_per_token, abs=0.0006)
