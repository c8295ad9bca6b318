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
    sequences = 1000
    tokens = sequences * length
    flops = step_flops(
        MODEL_PRESETS[preset],
        tokens=tokens,
        sum_squared_lengths=sequences * length**2,
        sequences=sequences,
        preds=round(0.15 * tokens),
    )
    assert flops / tokens / 1e9 == pytest.approx(gflops_per_token, abs=0.0006)
