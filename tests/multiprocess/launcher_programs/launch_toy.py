"""`python launch_toy.py NUM_RANKS LOG_DIR|- ARGUMENT...`: start toy_rank as the launcher starts any program."""

import os
import sys

from launcher.job import Job
from launcher.supervisor import run_with_restarts

_, ranks, logs, *arguments = sys.argv
job = Job("toy_rank", tuple(arguments), log_directory=None if logs == "-" else logs)
restarts = int(os.environ.get("TOY_RESTARTS", "0"))
sys.exit(run_with_restarts(job, int(ranks), restarts, None))
