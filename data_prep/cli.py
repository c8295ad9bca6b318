"""Command line of data preparation."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from albert.command_line import CommandParser
from albert.errors import ConfigError, run_command
from data_prep.settings import BuildSettings

_FORWARDING_S = 1.0
"""mpirun passes on what a rank wrote before it ends, but not what it finds after an abort."""
_EXAMPLES = """examples:
  python -m data_prep tokenizer --input corpus.txt --output tok --vocab-size 8000
  python -m data_prep build --input corpus.txt --tokenizer tok --output dataset --workers 4
  python -m data_prep build --input zh/*.txt.gz --tokenizer vocab.txt --output dataset --dupe-factor 5
  mpirun -n 64 python -m data_prep build --mpi --input books.txt wiki.jsonl --tokenizer tok --output dataset
  python -m data_prep verify dataset --workers 8
  python -m data_prep audit dataset --html report.html
  python -m data_prep show dataset --examples 3
  python -m data_prep demo-corpus --output demo

Text files hold one sentence or one paragraph per line and a blank line between documents; JSONL holds one
document per line under "text". .gz, .zst, .xz and .bz2 are read directly. A build that was killed goes on when
the same command is given again, and its bytes are the same for any number of workers."""


def main() -> None:
    """Entry point of `python -m data_prep`."""
    try:
        sys.exit(run_command(_main))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; a build goes on when the same command is given again\n")
        sys.exit(130)


def _main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "python -m data_prep",
        description="Turn raw text into shards of masked examples for ALBERT pretraining.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_tokenizer(commands)
    _add_build(commands)
    verify = commands.add_parser("verify", help="check every byte of a dataset against its manifest")
    verify.add_argument("directory", metavar="DIR")
    verify.add_argument("--workers", type=int, default=1, help="processes (1)")
    verify.set_defaults(run=_run_verify)
    audit = commands.add_parser("audit", help="statistics of a dataset, and warnings that mean something")
    audit.add_argument("directory", metavar="DIR")
    audit.add_argument("--html", metavar="FILE", help="also write a report with plots")
    audit.add_argument(
        "--max-blocks", type=int, default=200, help="blocks to look at (200), spread over all shards"
    )
    audit.set_defaults(run=_run_audit)
    show = commands.add_parser("show", help="print examples: original, masked, labels")
    show.add_argument("directory", metavar="DIR")
    show.add_argument("--examples", type=int, default=3, help="how many (3)")
    show.add_argument("--split", choices=("train", "eval"), default="train")
    show.set_defaults(run=_run_show)
    demo = commands.add_parser(
        "demo-corpus", help="gather English text that every Python carries, for a first try"
    )
    demo.add_argument("--output", required=True, metavar="DIR")
    demo.add_argument("--input", metavar="FILE", help="your own text instead; the pair task is made from it")
    demo.set_defaults(run=_run_demo_corpus)
    return parser


def _add_tokenizer(commands: Any) -> None:
    parser = commands.add_parser("tokenizer", help="train a SentencePiece model from text")
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, metavar="DIR", help="gets spiece.model")
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="pieces, special tokens included; ALBERT: 30000"
    )
    parser.add_argument("--cased", action="store_true", help="keep case and accents (ALBERT folds both)")
    for name in ("format", "text_key", "encoding"):
        field = BuildSettings.model_fields[name]
        _add_setting(parser, name, field.annotation, field.description or "", field.default)
    parser.add_argument(
        "--max-sentences", type=int, default=2_000_000, help="sentences to learn from (2000000)"
    )
    parser.add_argument("--character-coverage", type=float, help="default 0.99995, for Chinese 0.9995")
    parser.add_argument(
        "--fit",
        action="store_true",
        help="take fewer pieces where the text yields fewer, and leave rare characters out where not all fit",
    )
    parser.set_defaults(run=_run_tokenizer)


def _add_build(commands: Any) -> None:
    parser = commands.add_parser(
        "build", help="text to shards of masked sentence pairs", formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE")
    parser.add_argument(
        "--tokenizer", required=True, metavar="MODEL", help="spiece.model, vocab.txt or their directory"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="new directory, or one whose build was interrupted"
    )
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="PATTERN=W",
        help="use the input files that match PATTERN W times as often (W may be a fraction)",
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all cores)"
    )
    parser.add_argument(
        "--mpi", action="store_true", help="ranks of mpirun or srun do the work; rank 0 hands it out"
    )
    parser.add_argument(
        "--part",
        metavar="K/N",
        help="do part K (0 to N-1) of N beside others that do theirs on a shared disk, and write no manifest; the\n"
        "same command without --part then finishes. 'rank': K and N are RANK and WORLD_SIZE",
    )
    for name, field in BuildSettings.model_fields.items():
        _add_setting(parser, name, field.annotation, field.description or "", field.default)
    parser.set_defaults(run=_run_build)


def _add_setting(parser: argparse.ArgumentParser, name: str, kind: Any, text: str, default: Any) -> None:
    """One option from one field of the settings: the field's documentation is the help."""
    option = "--" + name.replace("_", "-")
    if kind is bool:
        parser.add_argument(option, action="store_true", help=text)
        return
    if get_origin(kind) is Literal:
        parser.add_argument(option, choices=get_args(kind), default=default, help=f"{text} ({default})")
        return
    if get_origin(kind) in (Union, type(int | None)):
        kind = next(part for part in get_args(kind) if part is not type(None))
    shown = text if default is None else f"{text} ({default})"
    parser.add_argument(option, type=kind, default=default, help=shown, metavar=kind.__name__.upper())


def _settings(options: argparse.Namespace) -> BuildSettings:
    """The settings of a command; those that it has no option for keep their default."""
    given = {name: getattr(options, name) for name in BuildSettings.model_fields if hasattr(options, name)}
    try:
        return BuildSettings(**given)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(item) for item in error.errors())) from error


def _describe(item: Any) -> str:
    if not item["loc"]:
        return str(item["msg"]).removeprefix("Value error, ")
    option = "--" + str(item["loc"][0]).replace("_", "-")
    return f"{option} {item['input']}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _run_build(options: argparse.Namespace) -> None:
    from data_prep.build import BuildRequest, build, build_part
    from data_prep.parallel import mpi_communicator

    _check_positive("--workers", options.workers)
    if options.part is not None and options.mpi:
        raise ConfigError("--part: MPI ranks share a build by themselves; use --mpi or --part, not both")
    part = None if options.part is None else _part(options.part)
    comm = mpi_communicator() if options.mpi else None
    request = BuildRequest(
        tuple(options.input),
        options.tokenizer,
        options.output,
        _settings(options),
        tuple(options.weight),
        options.workers,
    )
    if part is not None:
        build_part(request, *part)
        print(f"{options.output}: part {part[0]}/{part[1]} is done")
        return
    try:
        manifest = build(request, comm)
    except BaseException as error:
        if comm is not None and comm.size > 1:
            _abort(comm, error)
        raise
    if manifest is not None:
        _print_summary(options.output, manifest)


def _part(text: str) -> tuple[int, int]:
    """Index and count of `K/N`.

    Raises:
        ConfigError: it is no such pair, or there is no RANK.
    """
    environment = (os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", ""))
    words = environment if text == "rank" else text.split("/")
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[0]) >= int(words[1]):
        where = " (RANK and WORLD_SIZE)" if text == "rank" else ""
        raise ConfigError(
            f"--part {text}{where}: {'/'.join(words)} is no K/N with K from 0 to N-1, such as 0/8"
        )
    return int(words[0]), int(words[1])


def _check_positive(option: str, number: int) -> None:
    if number < 1:
        raise ConfigError(f"{option} {number}: must be at least 1")


def _abort(comm: Any, error: BaseException) -> None:
    """End all ranks: the others wait for this one and would do so for ever."""

    def fail() -> None:
        raise error

    try:
        code = run_command(fail)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    time.sleep(_FORWARDING_S)
    comm.Abort(code)


def _print_summary(output: str, manifest: Any) -> None:
    totals = manifest.totals
    rejected = {k.removeprefix("rejected."): v for k, v in totals.items() if k.startswith("rejected.")}
    print(f"{output}: {len(manifest.shards)} shards, manifest {manifest.sha256[:16]}")
    print(
        f"  documents {totals['documents_in']:,}: train {totals.get('train.documents', 0):,}, "
        f"eval {totals.get('eval.documents', 0):,}, rejected {rejected or 0}"
    )
    for split in ("train", "eval"):
        if examples := totals.get(f"{split}.examples", 0):
            tokens, masked = totals[f"{split}.tokens"], totals[f"{split}.masked_tokens"]
            print(
                f"  {split}: {examples:,} examples, {tokens:,} tokens "
                f"({tokens / examples:.0f} per example), {100 * masked / tokens:.1f} % predicted"
            )
        else:
            print(f"  {split}: empty")


def _run_tokenizer(options: argparse.Namespace) -> None:
    from albert.tokenization import load_tokenizer
    from data_prep.tokenizer import train_tokenizer

    target = train_tokenizer(
        options.input,
        Path(options.output),
        options.vocab_size,
        cased=options.cased,
        settings=_settings(options),
        max_sentences=options.max_sentences,
        character_coverage=options.character_coverage,
        fits_text=options.fit,
    )
    print(f"{target}: {load_tokenizer(target).vocab_size} pieces")


def _run_verify(options: argparse.Namespace) -> None:
    from data_prep.verify import verify_dataset

    _check_positive("--workers", options.workers)
    manifest = verify_dataset(options.directory, options.workers)
    blocks = sum(len(shard.blocks) for shard in manifest.shards)
    print(
        f"{options.directory}: {len(manifest.shards)} shards, {blocks} blocks, every byte as the manifest says"
    )


def _run_audit(options: argparse.Namespace) -> None:
    from data_prep.audit import audit_dataset
    from data_prep.audit_report import report_lines

    _check_positive("--max-blocks", options.max_blocks)
    audit = audit_dataset(options.directory, options.max_blocks)
    print("\n".join(report_lines(audit)))
    if options.html:
        from data_prep.audit_html import write_html

        write_html(audit, Path(options.html))
        print(f"report with plots: {options.html}")


def _run_show(options: argparse.Namespace) -> None:
    from data_prep.show import show_examples

    _check_positive("--examples", options.examples)
    print("\n\n".join(show_examples(options.directory, options.split, options.examples)))


def _run_demo_corpus(options: argparse.Namespace) -> None:
    from data_prep.demo_corpus import write_demo_corpus

    source = Path(options.input) if options.input else None
    print(write_demo_corpus(Path(options.output), source))
