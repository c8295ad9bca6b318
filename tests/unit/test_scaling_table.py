"""The table of docs/SCALING.md is what the simulator prints, and the simulator obeys its own limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from albert.model_config import MODEL_PRESETS
from benchmarks.scaling_table import SIZES, Cluster, compute_s, efficiency, reduction_s, step_s, table
from launcher.devices import find_device

H200 = find_device("h200")


def test_the_document_holds_the_table():
    assert table(H200, {}) in (Path(__file__).parents[2] / "docs" / "SCALING.md").read_text()


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
    parameters = 10**9
    expected_s = 2 * 7 / 8 * 2 * parameters / H200.link_bytes_per_s
    assert reduction_s(parameters, Cluster(H200, 8, 1.0)) == pytest.approx(expected_s, rel=0.02)
    fp32 = Cluster(H200, 8, 1.0, gradients="fp32")
    assert reduction_s(parameters, fp32) == pytest.approx(2 * expected_s, rel=0.02)
