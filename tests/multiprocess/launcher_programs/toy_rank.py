"""A small real training program: gloo ranks that agree on a stop each step and commit before they leave."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--exit", default="", help="RANK:CODE, a rank that fails at step 2")
    parser.add_argument("--commit-s", type=float, default=0.0)
    return parser.parse_args([word for word in sys.argv[1:] if not word.startswith("--echo=")])


def main():
    echoed = [word.removeprefix("--echo=") for word in sys.argv if word.startswith("--echo=")]
    options = parse()
    rank, names = int(os.environ["RANK"]), ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    facts = [os.environ[name] for name in names] + [os.environ["OMP_NUM_THREADS"]]
    (options.directory / f"facts-{rank}").write_bytes(os.fsencode("\0".join([*facts, *echoed])))
    received = []
    for number in STOP:
        signal.signal(number, lambda number, frame: received.append(number))
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for step in range(options.steps):
        total = torch.ones(2)
        total[1] = float(bool(received))
        dist.all_reduce(total)
        assert total[0] == dist.get_world_size()
        if options.exit and step == 2 and int(options.exit.split(":")[0]) == rank:
            return int(options.exit.split(":")[1])
        print(f"rank {rank} step {step}", flush=True)
        (options.directory / f"step-{rank}").write_text(f"{os.getpid()} {step}")
        if total[1] > 0:
            if rank == 0:
                while not received:  # the other rank may have heard it first
                    time.sleep(0.01)
                time.sleep(options.commit_s)
                (options.directory / "committed").write_text(" ".join(map(str, received)))
            return 75
        time.sleep(0.02)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except RuntimeError as error:
        sys.stderr.write(f"lost a peer: {error}\n")
        code = 76
    os._exit(code) if code else sys.exit(0)
