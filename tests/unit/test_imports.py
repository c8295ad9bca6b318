"""What has to start fast imports neither torch nor DeepSpeed."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "albert.config",
        "albert.deepspeed_config",
        "albert.errors",
        "albert.flops",
        "albert.masking",
        "albert.model_config",
        "albert.remote",
        "albert.sample_order",
        "albert.shard_cache",
        "albert.blocks",
        "albert.manifest",
        "albert.shards",
        "albert.tokenization",
        "data_prep.build",
        "data_prep.cli",
        "launcher.cli",
        "launcher.rank",
    ],
)
def test_starts_without_torch(module):
    heavy = {"torch", "deepspeed", "transformers"}
    code = f"import sys, {module}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"importing {module} also imports {result.stderr.strip()}"
