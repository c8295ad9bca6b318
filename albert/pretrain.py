"""Entry point of pretraining: `python -m albert.pretrain --config RECIPE_OR_FILE [section.key=value ...]`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from albert.addresses import is_remote
from albert.command_line import CommandParser
from albert.config import RunConfig, load_run_config, recipe_names
from albert.deepspeed_config import build_deepspeed_config
from albert.durable_files import write_file_durably
from albert.errors import ConfigError, NonFiniteError, PreemptedError, end_rank, run_command
from albert.manifest import Manifest, check_files, dataset_tokenizer, read_manifest
from albert.probes import check_probe
from albert.run_lock import lock_for_all_ranks
from albert.stopping import StopRequest

if TYPE_CHECKING:
    from albert.distributed import World
    from albert.engine import Engine
    from albert.evaluation import Evaluator
    from albert.monitoring import Monitor

Placement = dict[str, Any]
"""A complete DeepSpeed dictionary."""

_HANG_TIMEOUT_S = 10.0
_COMPILING_HANG_TIMEOUT_S = 60.0

_EXAMPLES = """examples:
  python -m albert.pretrain --config demo data.directory=data/shards train.output_dir=runs/first
  python -m launcher local -n 8 pretrain --config base data.directory=data/shards
  python -m albert.pretrain --config my.yaml train.num_steps=20000 optimizer.learning_rate=1e-3
  python -m albert.pretrain --config xlarge --show       (print the resolved configuration and stop)
  python -m albert.pretrain --config my.yaml --audit-ledger

A run that was stopped or killed goes on where it was when the same command is given again.
exit codes: 0 done, 65 bad data, 66 missing input, 70 non-finite, 74 disk, 75 stopped with the checkpoint
committed (start it again), 76 another rank was lost, 77 refused as unsafe, 78 configuration"""


def main() -> None:
    """Console entry point."""
    end_rank(run_command(_main))


def _main() -> None:
    stop = StopRequest()
    stop.install()
    arguments = _parse(sys.argv[1:])
    config = load_run_config(arguments.config, [*arguments.profile, *arguments.overrides])
    if arguments.show:
        sys.stdout.write(config_text(config))
        return
    if arguments.audit_ledger:
        _audit_ledger(config)
        return
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    placement = build_deepspeed_config(config, world_size)
    manifest = read_manifest(config.data.directory)
    _check_output_directory(config)
    check_probe(config.probe)
    # Everything above fails in milliseconds; the imports below take seconds.
    from albert.distributed import close_world, init_world, peer_errors
    from albert.loader import check_dataset
    from albert.pretrained import check_replaceable

    check_dataset(
        manifest, config.model.vocab_size, config.model.max_position_embeddings, config.data.directory
    )
    check_replaceable(Path(config.train.output_dir) / "model")
    if _is_first_of_node():
        check_files(config.data.directory, manifest)
    with peer_errors():
        world = init_world(config.train.device, config.train.peer_timeout_s)
        try:
            _train(config, placement, manifest, world, stop)
        except (NonFiniteError, PreemptedError):
            close_world()  # all ranks are here; without it the interpreter may end with SIGABRT
            raise
        close_world()


def _is_first_of_node() -> bool:
    """Before the ranks meet: one of them looks at every shard, lest thousands do on one file system."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m albert.pretrain",
        description="Pretrain an ALBERT with masked language modelling and sentence-order prediction.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, help=f"recipe ({', '.join(recipe_names())}) or path of a YAML file"
    )
    parser.add_argument("--show", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--profile",
        action="store_const",
        const=["log.profile_steps=3"],
        default=[],
        help="trace three steps to RUN/profile for Perfetto or TensorBoard, and print where their time goes",
    )
    parser.add_argument(
        "--audit-ledger",
        action="store_true",
        help="check from the ledger of the run (log.ledger=true) that no example was lost or repeated, and stop",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change values of the configuration"
    )
    return parser.parse_intermixed_args(argv)


def config_text(config: RunConfig) -> str:
    """The resolved configuration as YAML, one section per line group."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


def _check_output_directory(config: RunConfig) -> None:
    path = Path(config.train.output_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"train.output_dir ({path}) is a file; name a directory")


def _audit_ledger(config: RunConfig) -> None:
    """Print what the ledger of a run proves.

    Raises:
        MissingInputError: there is no ledger.
        DataError: an example was lost, repeated or used out of order.
    """
    from albert.checkpoint import list_steps
    from albert.ledger_audit import audit_ledger
    from albert.loss_spikes import read_skipped
    from albert.sample_order import SampleOrder

    run = Path(config.train.output_dir)
    manifest = read_manifest(config.data.directory)
    order = SampleOrder.of_dataset(config.data, manifest, config.seed, config.train.global_batch_size)
    skipped = [(step.begin, step.end) for step in read_skipped(run / "checkpoints")]
    steps = list_steps(run / "checkpoints")
    report = audit_ledger(run / "ledger", order, skipped, steps[-1] if steps else None)
    sys.stdout.write(f"{report}\n")


def _train(
    config: RunConfig, placement: Placement, manifest: Manifest, world: World, stop: StopRequest
) -> None:
    """Build the parts, go on from the newest checkpoint, train, write the final model."""
    from albert.loader import BatchPlan, TrainLoader
    from albert.run_checkpoints import RunCheckpoints
    from albert.trainer import Trainer
    from albert.watchdog import SLOW_PHASES, Watchdog

    train = config.train
    lock = lock_for_all_ranks(Path(train.output_dir), "train.output_dir", world)
    plan = BatchPlan(train.global_batch_size, train.micro_batch_size, world.rank, world.size, train.num_steps)
    # A shard that has to be fetched first takes as long as the network does.
    slow = (*SLOW_PHASES, "data", "evaluate") if is_remote(config.data.directory) else SLOW_PHASES
    with Watchdog(world, _hang_timeout_s(config, world), train.peer_timeout_s, slow) as watchdog:
        loader = TrainLoader(config.data, manifest, plan, config.seed, names_examples=config.log.ledger)
        evaluator = _build_evaluator(config, manifest, world)
        engine = _build_engine(config, placement, world)
        checkpoints = RunCheckpoints(config, manifest, engine, world)
        state = checkpoints.resume(_warn)
        monitor = _start_monitor(config, state.step if state else 0) if world.is_main else None
        with monitor or contextlib.nullcontext():
            trainer = Trainer(
                config, engine, loader, evaluator=evaluator, monitor=monitor, stop=stop,
                checkpoints=checkpoints, watchdog=watchdog,
            )  # fmt: skip
            if state:
                trainer.go_on_from(state)
                if monitor:
                    monitor.event(state.step, f"resumed on {world.size} ranks")
            is_finished = trainer.fit()
            if is_finished:
                watchdog.enter("save", trainer.step)
                _write_model(config, manifest, engine, monitor)
                trainer.finish_probes()
    if not is_finished:
        reason = stop.signal_name or (
            "train.stop_after_steps" if train.stop_after_steps else "a signal to another rank"
        )
        raise PreemptedError(
            f"step {trainer.step} of {train.num_steps} ({reason}), checkpoint committed; "
            "give the same command again to go on"
        )
    if lock:
        lock.close()


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")


def _build_evaluator(config: RunConfig, manifest: Manifest, world: World) -> Evaluator | None:
    from albert.evaluation import Evaluator

    return Evaluator(config, manifest, world) if config.eval.interval_steps else None


def _build_engine(config: RunConfig, placement: Placement, world: World) -> Engine:
    from albert import fp8
    from albert.engine import Engine
    from albert.heads import AlbertForPreTraining

    model = AlbertForPreTraining(config.model, seed=config.seed)
    model.activation_checkpointing = config.train.activation_checkpointing
    is_compiled, compile_options = _compiles(config, world), {}
    if config.train.fp8 != "off":
        model.use_product(fp8.fp8_product(config.train.fp8, world.device, is_compiled=is_compiled))
        compile_options = fp8.COMPILE_OPTIONS
    if is_compiled:
        model.compile_layers(**compile_options)
    return Engine(model, config.optimizer, placement, world)


def _compiles(config: RunConfig, world: World) -> bool:
    """auto: where one kernel attends to all sequences; without it every new set of lengths is compiled anew."""
    from albert.attention import has_flash_kernel
    from albert.precision import DTYPES

    model, train = config.model, config.train
    if train.compile != "auto":
        return train.compile == "on"
    head_dim = model.hidden_size // model.num_attention_heads
    has_kernel = has_flash_kernel(world.device, DTYPES[train.precision], head_dim)
    return has_kernel and model.attention_probs_dropout_prob == 0.0


def _hang_timeout_s(config: RunConfig, world: World) -> float:
    timeout_s = config.train.hang_timeout_s
    if timeout_s == "auto":
        return _COMPILING_HANG_TIMEOUT_S if _compiles(config, world) else _HANG_TIMEOUT_S
    return timeout_s


def _start_monitor(config: RunConfig, first_step: int) -> Monitor:
    from albert.monitoring import Monitor

    directory = Path(config.train.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    text = config_text(config)
    write_file_durably(directory / "config.yaml", [text.encode()])
    monitor = Monitor(directory, config.log, first_step, config.train.num_steps)
    monitor.print(text)
    return monitor


def _write_model(config: RunConfig, manifest: Manifest, engine: Engine, monitor: Monitor | None) -> None:
    """RUN/model: configuration, fp32 weights and tokenizer of the finished run. Collective."""
    from albert.pretrained import save_pretrained

    weights = {name: tensor for part, name, tensor in engine.gather_state() if part == "weights"}
    if monitor:
        directory = Path(config.train.output_dir) / "model"
        tokenizer = dataset_tokenizer(config.data.directory, manifest, config.data.cache)
        save_pretrained(directory, config.model, weights, tokenizer)
        monitor.print(f"model written: {directory}")


if __name__ == "__main__":
    main()
