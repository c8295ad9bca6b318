"""The table of docs/SCALING.md is what the simulator prints, and the simulator obeys its own limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from albert.model_config import MODEL_PRESETS
from benchmarks.scaling_table import (
    SIZES,
    Cluster,
    compute_s,
    efficiency,
    goodput_line,
    reduction_s,
    step_s,
    table,
)
from launcher.devices import find_device

H200 = find_device("h200")


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_the_document_holds_the_tables(gradients):
    document = (Path(__file__).parents[2] / "docs" / "SCALING.md").read_text()
    assert table(H200, {}, gradients) in document
    assert goodput_line() in document


@pytest.mark.parametrize("name", SIZES)
def test_a_step_is_never_shorter_than_its_computation_and_reduction(name):
    config = MODEL_PRESETS[name]
    share = H200.efficiency(config.hidden_size)
    for num_devices in (8, 64, 512, 4096):
        cluster = Cluster(H200, num_devices, 50e9)
        floor_s = compute_s(config, H200, 4096 / num_devices, share)
        assert step_s(config, cluster, 4096, share) > floor_s
        assert 0 < efficiency(config, cluster, 4096, share) <= 1


def test_a_reduction_inside_one_node_takes_its_bytes_over_the_link():
    """Twice the gradients and once the bf16 weights."""
    parameters = 10**9
    for gradients, size in (("fp32", 2 * 4 + 2), ("bf16", 2 * 2 + 2)):
        expected_s = 7 / 8 * size * parameters / H200.link_bytes_per_s
        cluster = Cluster(H200, 8, 1.0, gradients)
        assert reduction_s(parameters, cluster) == pytest.approx(expected_s, rel=0.02)
