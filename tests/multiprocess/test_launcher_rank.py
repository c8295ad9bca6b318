"""One rank under its parent: records, signals to the whole group at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.job import Job

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_rank_that_dies_of_a_stop_signal_sent_to_its_whole_group_was_asked_to_stop(tmp_path, number):
    # As Slurm does; the rank has no handler yet, as while it imports torch.
    job = Job("time_sleeper", (), status_directory=str(tmp_path))
    (tmp_path / "time_sleeper.py").write_text("import time; time.sleep(60)")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    command = [sys.executable, "-m", "launcher.rank", "--job", job.encode()]
    parent = subprocess.Popen(command, env=environment, start_new_session=True)
    while not (tmp_path / "rank-0.started.json").exists():
        assert parent.poll() is None
        time.sleep(0.01)
    os.killpg(parent.pid, number)
    assert parent.wait(timeout=20) == 0
    record = json.loads((tmp_path / "rank-0.ended.json").read_text())
    assert record["code"] == -number
    assert int(number) in record["sent"]
