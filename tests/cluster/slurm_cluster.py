"""A real Slurm on the hosts of `machines`: a controller on ctl, a daemon on each node, quick reactions."""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from machines import PATH, Machines, wait_until

COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
_CONF = """
ClusterName=test
SlurmctldHost=ctl({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={state}/state
SlurmdSpoolDir={state}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd-%n.log
FirstJobId={first_job_id}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=15
MinJobAge=600
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
MessageTimeout=10
UnkillableStepTimeout=30
ReturnToService=2
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF
"""
_NODE = (
    "NodeName={name} NodeAddr={address} NodeHostname={name} CPUs=4 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:8 State=UNKNOWN"
)
_READY = re.compile(r"^(idle|mix|alloc)$", re.MULTILINE)


class SlurmCluster:
    """Slurm with all nodes ready; jobs of the tests take two of them, the last one is a spare."""

    def __init__(self, nodes: Sequence[str] = ("node1", "node2", "node3")) -> None:
        self.machines = Machines(nodes)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        for name in self.machines.names:
            self.machines.boot(name)
        self.state = self.machines.directory / "slurm"
        self.state.mkdir(mode=0o755)
        (self.state / "state").mkdir()
        self._configure()
        self._start_munge()
        self.machines.run("ctl", "slurmctld", "-f", self.state / "slurm.conf")
        for name in self.machines.nodes:
            self.start_node(name)
        self.wait_for_nodes()

    def _configure(self) -> None:
        machines = self.machines
        nodes = [_NODE.format(name=name, address=machines.address(name)) for name in machines.nodes]
        text = _CONF.format(
            controller=machines.address("ctl"),
            state=self.state,
            # Job ids of an earlier cluster would lead to its log directories.
            first_job_id=random.randrange(1000, 30_000_000),
            nodes="\n".join(nodes),
        )
        (self.state / "slurm.conf").write_text(text)
        (self.state / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        # Pretended GPUs, so that the templates' requests hold: other names of /dev/null.
        for number in range(8):
            os.mknod(self.state / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.state / "gres.conf").write_text(f"Name=gpu File={self.state}/nvidia[0-7]\n")
        machines.variables["SLURM_CONF"] = str(self.state / "slurm.conf")

    def _start_munge(self) -> None:
        key = self.state / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {
            "key-file": key,
            "socket": "munge.sock",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        options = [f"--{name}={self.state / value}" for name, value in files.items()]
        # One for all hosts: unix sockets cross network namespaces.
        self.machines.run(
            "ctl", "munged", "--force", "--pid-file=/run/munged.pid", "--num-threads=2", *options
        )

    def start_node(self, name: str) -> None:
        """Start the daemon of a node that is booted."""
        (self.state / f"spool-{name}").mkdir(exist_ok=True)
        self.machines.run(name, "slurmd", "-f", self.state / "slurm.conf", "-N", name)

    def wait_for_nodes(self) -> None:
        def all_ready() -> bool:
            states = self.machines.run("ctl", "sinfo", "-h", "-p", "main", "-N", "-o", "%t", check=False)
            if len(_READY.findall(states)) == len(self.machines.nodes):
                return True
            for name in self.machines.nodes:
                self.machines.run(
                    "ctl", "scontrol", "update", f"nodename={name}", "state=resume", check=False
                )
            return False

        wait_until(all_ready, 30, "the Slurm nodes did not become ready", 0.3)

    def job(self, job_id: int) -> dict[str, str]:
        """What Slurm says of a job."""
        text = self.machines.run("ctl", "scontrol", "show", "job", "--oneliner", str(job_id))
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for_state(self, job_id: int, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        deadline = time.monotonic() + timeout_s
        while (fields := self.job(job_id))["JobState"] not in states:
            assert time.monotonic() < deadline, (
                f"job {job_id} is {fields['JobState']}, not {states}: {fields}"
            )
            time.sleep(0.3)
        return fields

    def close(self) -> None:
        self.machines.close()


def missing_commands() -> list[str]:
    """Commands of Slurm that are not installed."""
    return [name for name in COMMANDS if shutil.which(name, path=PATH) is None]


def tail(path: Path, lines: int = 40) -> str:
    """The end of a log, for messages of failed tests."""
    return (
        "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else f"no {path}"
    )
