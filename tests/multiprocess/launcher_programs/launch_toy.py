"""`python launch_toy.py NUM_RANKS LOG_DIR|- ARGUMENT...`: start toy_rank as the launcher starts any program."""

import os
import sys

from launcher.job import Job
from launcher.local import plan_local, run_local

_, ranks, logs, *arguments = sys.argv
job = Job("toy_rank", tuple(arguments), log_directory=None if logs == "-" else logs)
sys.exit(run_local(plan_local(job, int(ranks), os.environ)))
