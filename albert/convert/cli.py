"""Command line of the conversions: `python -m albert.convert COMMAND ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from albert.command_line import CommandParser
from albert.errors import ConfigError, MissingInputError, UnsafeError, run_command
from albert.model_config import ModelConfig, read_model_config

if TYPE_CHECKING:
    from albert.convert.foreign import Imported

_EXAMPLES = """examples:
  python -m albert.convert sizes
  python -m albert.convert inspect albert_tiny/albert_model.ckpt
  python -m albert.convert from-tf albert_base/model.ckpt-best --config albert_base/albert_config.json \\
      --tokenizer albert_base/30k-clean.model --output models/base
  python -m albert.convert from-tf albert_xlarge_zh --tokenizer vocab.txt --output models/xlarge_zh \\
      --probe some_chinese_text.txt
  python -m albert.convert from-albert-pytorch pytorch_model.bin --config config.json --output models/lp
  python -m albert.convert from-hf albert-base-v2/ --output models/base
  python -m albert.convert to-hf runs/first/model --output exported/
  python -m albert.convert to-hf runs/first --architecture AlbertForMaskedLM --output exported_mlm/
  python -m albert.convert to-onnx runs/lcqmc/model --output lcqmc.onnx
  python -m albert.convert verify-checkpoint runs/first

MODEL is a model directory, a Hugging Face directory, a training checkpoint or a run directory.
exit codes: 0 done, 65 damaged or wrong weights, 66 missing input, 77 refused as unsafe, 78 configuration"""


def main() -> None:
    """Console entry point."""
    sys.exit(run_command(_main))


def _main() -> None:
    options = build_parser().parse_args()
    options.run(options)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m albert.convert",
        description="Bring ALBERT weights of other projects in, and take them out again.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.set_defaults(run=run)
        return command

    add("sizes", _sizes, "print parameter counts of all presets and albert_pytorch's size table")
    add("inspect", _inspect, "list what a checkpoint or model holds").add_argument("path", type=Path)
    verify = add("verify-checkpoint", _verify, "check every byte of a training checkpoint")
    verify.add_argument("path", type=Path, help="checkpoint, or run directory (all its checkpoints)")
    _add_import(add("from-tf", _from_tf, "import a TensorFlow checkpoint of Google or brightmart"))
    _add_import(add("from-hf", _from_hf, "import a Hugging Face directory"))
    lone = add("from-albert-pytorch", _from_albert_pytorch, "import albert_pytorch's pytorch_model.bin")
    _add_import(lone)
    lone.add_argument(
        "--legacy-pooled-shift",
        action="store_true",
        help="the model is a classifier that was trained with `pooled_output + 0.1`",
    )
    to_hf = add("to-hf", _to_hf, "export a Hugging Face directory")
    to_hf.add_argument("model", metavar="MODEL", type=Path)
    to_hf.add_argument("--output", type=Path, required=True, help="directory to write")
    to_hf.add_argument(
        "--architecture", help="class that will load it (default: by the heads that are there)"
    )
    to_onnx = add("to-onnx", _to_onnx, "export an ONNX file and check it with onnxruntime")
    to_onnx.add_argument("model", metavar="MODEL", type=Path)
    to_onnx.add_argument("--output", type=Path, required=True, help="file to write")
    return parser


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=Path, help="checkpoint prefix, file or directory")
    command.add_argument("--output", type=Path, required=True, help="model directory to write")
    command.add_argument(
        "--config", type=Path, help="configuration (default: the only *config*.json beside it)"
    )
    command.add_argument("--tokenizer", type=Path, help="spiece.model or vocab.txt (default: beside it)")
    command.add_argument("--num-attention-heads", type=int, help="instead of the configuration's")
    command.add_argument("--hidden-act", choices=("gelu_new", "gelu", "relu"), help="likewise")
    command.add_argument("--ln-type", choices=("postln", "preln"), help="likewise")
    command.add_argument(
        "--probe",
        type=Path,
        metavar="TEXT",
        help="compare head counts, activations and LayerNorm orders by their masked-language loss on this "
        "text file, and take the best",
    )


def _refuse_own_source(source: Path, output: Path) -> None:
    """Refuse to replace what is converted.

    Raises:
        UnsafeError: both are one directory or file.
    """
    if source.resolve() == output.resolve():
        raise UnsafeError(f"--output {output}: is the source itself; choose another output directory")


def _sizes(_options: argparse.Namespace) -> None:
    from albert.convert.sizes import size_table

    print(size_table())


def _inspect(options: argparse.Namespace) -> None:
    from albert.convert.inspecting import describe

    print(describe(options.path))


def _verify(options: argparse.Namespace) -> None:
    from albert.checkpoint import list_steps, step_directory, verify

    directory = options.path / "checkpoints" if (options.path / "checkpoints").is_dir() else options.path
    paths = [step_directory(directory, step) for step in list_steps(directory)] or [options.path]
    for path in paths:
        manifest = verify(path)
        total = sum(entry.bytes for entry in manifest.files.values())
        print(f"{path}: {len(manifest.files)} files, {total:,} bytes, all as written")


def _from_tf(options: argparse.Namespace) -> None:
    from albert.convert.tensorflow import read_tensorflow

    _finish(options, read_tensorflow(options.path, _config(options), _overrides(options)))


def _from_albert_pytorch(options: argparse.Namespace) -> None:
    from albert.convert.albert_pytorch import read_albert_pytorch

    imported = read_albert_pytorch(
        options.path,
        _config(options),
        _overrides(options),
        legacy_pooled_shift=options.legacy_pooled_shift,
    )
    _finish(options, imported)


def _from_hf(options: argparse.Namespace) -> None:
    from albert.convert.foreign import Imported, published_mistakes, with_fields
    from albert.convert.huggingface import read_hugging_face

    _refuse_own_source(options.path, options.output)
    if options.config is not None:
        raise ConfigError("--config: a Hugging Face directory has its own config.json; edit that one")
    config, state = read_hugging_face(options.path)
    config = with_fields(config, _overrides(options))
    _finish(options, Imported(config, state, published_mistakes(config)))


def _finish(options: argparse.Namespace, imported: Imported) -> None:
    """Say what was noticed, probe if asked, write the model directory."""
    from albert.pretrained import find_tokenizer, save_pretrained
    from albert.weights import part_of

    for note in imported.notes:
        sys.stderr.write(f"note: {note}\n")
    beside = options.path if options.path.is_dir() else options.path.parent
    tokenizer = options.tokenizer or find_tokenizer(beside)
    config = imported.config
    if options.probe is not None:
        config = _probe(options, imported, tokenizer)
    save_pretrained(options.output, config, imported.state, tokenizer)
    count = sum(tensor.numel() for tensor in imported.state.values())
    parts = dict.fromkeys(part_of(name) for name in imported.state)
    print(
        f"{options.output}: {len(imported.state)} tensors, {count:,} parameters, layout {config.layout}, "
        f"parts {' '.join(parts)}"
    )
    if tokenizer is None:
        sys.stderr.write("note: no tokenizer was found beside the checkpoint; give --tokenizer to add one\n")


def _probe(options: argparse.Namespace, imported: Imported, tokenizer: Path | None) -> ModelConfig:
    from albert.convert.foreign import with_fields
    from albert.convert.probe import probe
    from albert.tokenization import load_tokenizer

    if tokenizer is None:
        raise MissingInputError("--probe needs the model's tokenizer; give --tokenizer")
    scores = probe(imported.config, imported.state, load_tokenizer(tokenizer), options.probe)
    for score in scores:
        print(f"loss {score.loss:7.4f}  " + "  ".join(f"{k}={v}" for k, v in score.fields.items()))
    print("taking the first; give the options themselves to choose another")
    return with_fields(imported.config, scores[0].fields)


def _config(options: argparse.Namespace) -> ModelConfig:
    """The configuration file that was named, or the only one beside the checkpoint."""
    if options.config is not None:
        return read_model_config(options.config)
    directory = options.path if options.path.is_dir() else options.path.parent
    found = sorted(directory.glob("*config*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(f"{directory}: name the configuration with --config; files there: {names}")
    return read_model_config(found[0])


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    fields = {
        "num_attention_heads": options.num_attention_heads,
        "hidden_act": options.hidden_act,
        "ln_type": options.ln_type,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _to_hf(options: argparse.Namespace) -> None:
    from albert.convert.huggingface_export import write_hugging_face
    from albert.finetune.task_card import TaskCard
    from albert.pretrained import load_pretrained

    _refuse_own_source(options.model, options.output)
    config, state, tokenizer = load_pretrained(options.model)
    card = TaskCard.read(options.model)
    labels = card.labels if card else ()
    architecture = write_hugging_face(options.output, config, state, tokenizer, options.architecture, labels)
    print(f"{options.output}: load it with transformers.{architecture}.from_pretrained")


def _to_onnx(options: argparse.Namespace) -> None:
    from albert.convert.onnx import refuse_to_overwrite, write_onnx
    from albert.pretrained import load_pretrained

    refuse_to_overwrite(options.output)
    config, state, _ = load_pretrained(options.model)
    error = write_onnx(options.output, config, state, str(options.model))
    print(f"{options.output}: written; onnxruntime's logits differ by {error:.1e} relative")


def run(arguments: Sequence[str]) -> None:
    """Run a command from Python, errors raised."""
    options = build_parser().parse_args(arguments)
    options.run(options)
