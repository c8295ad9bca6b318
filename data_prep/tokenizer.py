"""Train a SentencePiece model in ALBERT's form: its special tokens in its order, its normalisation."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from albert.durable_files import write_file_durably
from albert.errors import ConfigError, MissingInputError, UnsafeError
from albert.tokenization import SENTENCEPIECE_FILE, normalise_texts
from data_prep.corpus import read_documents, reading_advice
from data_prep.plan import find_sources, plan_tasks
from data_prep.settings import BuildSettings

_USER_SYMBOLS = ("(", ")", '"', "-", ".", "\u2013", "\u00a3", "\u20ac")
"""Symbols that are always pieces of their own, as in ALBERT's own model."""
_CHINESE_COVERAGE, _COVERAGE = 0.9995, 0.99995
_LEAST_COVERAGE = 0.98
"""Of the trainer: a model that knows less of its text is of no use."""
_MAX_SENTENCE_CHARACTERS = 1000
"""The trainer skips what is longer than 4192 bytes; this is never longer."""


def train_tokenizer(
    inputs: Sequence[str],
    output: Path,
    vocab_size: int,
    *,
    cased: bool = False,
    settings: BuildSettings | None = None,
    max_sentences: int = 2_000_000,
    character_coverage: float | None = None,
    fits_text: bool = False,
) -> Path:
    """Train `OUTPUT/spiece.model` on the sentences of text files.

    Args:
        inputs: text files, as for `build`.
        output: directory, made where it does not exist.
        vocab_size: pieces, special tokens included.
        cased: keep case and accents; otherwise both are folded as ALBERT does.
        settings: how the files are read: format, text_key and encoding.
        max_sentences: sentences to learn from, spread evenly over the corpus.
        character_coverage: share of characters that become pieces; default 0.99995, Chinese 0.9995.
        fits_text: take fewer pieces from a text that yields fewer, and fewer characters where they are too many.

    Raises:
        MissingInputError: no such file, or the files hold no text.
        ConfigError: the vocabulary does not fit the text, or no such coverage is possible.
        UnsafeError: there is a tokenizer already.
    """
    target = output / SENTENCEPIECE_FILE
    if target.exists():
        raise UnsafeError(f"{target}: exists; remove it or name another --output")
    if character_coverage is not None and not _LEAST_COVERAGE <= character_coverage <= 1:
        raise ConfigError(f"--character-coverage {character_coverage}: must be from {_LEAST_COVERAGE} to 1")
    settings = settings or BuildSettings()
    every = _sampling_interval(inputs, settings, max_sentences)
    counts: Counter[str] = Counter()
    sentences = list(_sentences(inputs, settings, every, cased, counts))
    if not sentences:
        advice = reading_advice(counts, settings)
        raise MissingInputError(f"--input {' '.join(inputs)}: holds no text to learn from{advice}")
    if character_coverage is None:
        character_coverage = _CHINESE_COVERAGE if _is_chinese(sentences) else _COVERAGE
    train = _fit_model if fits_text else _train_model
    model = train(sentences, vocab_size, character_coverage)
    output.mkdir(parents=True, exist_ok=True)
    write_file_durably(target, [model])
    return target


class _TooManyCharactersError(ConfigError):
    """The vocabulary is too small for the characters of the text."""


def _fit_model(sentences: Sequence[str], vocab_size: int, character_coverage: float) -> bytes:
    """A model of at most `vocab_size` pieces; leaves out as many rare characters as it takes.

    Raises:
        ConfigError: too many would be left out.
    """
    while True:
        try:
            return _train_model(sentences, vocab_size, character_coverage, is_limit=True)
        except _TooManyCharactersError as error:
            if character_coverage == _LEAST_COVERAGE:
                share = f"{100 * _LEAST_COVERAGE:.0f} %"
                raise ConfigError(
                    f"--vocab-size {vocab_size}: too small even for the characters that make up {share} of this "
                    "text; ask for more"
                ) from error
            left_out = 2 * (1 - min(character_coverage, _COVERAGE))
            character_coverage = max(_LEAST_COVERAGE, 1 - left_out)


def _train_model(
    sentences: Sequence[str], vocab_size: int, character_coverage: float, *, is_limit: bool = False
) -> bytes:
    """A unigram model with ALBERT's special tokens.

    Args:
        sentences: to learn from.
        vocab_size: pieces.
        character_coverage: share of characters that become pieces.
        is_limit: take fewer pieces from a text that yields fewer.

    Raises:
        ConfigError: the vocabulary does not fit the text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=not is_limit,
            model_type="unigram",
            character_coverage=character_coverage,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece="<pad>",
            unk_piece="<unk>",
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
            user_defined_symbols=list(_USER_SYMBOLS),
            normalization_rule_name="nmt_nfkc",
            num_threads=1,  # more threads sum in another order: another model from the same text
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(vocab_size, str(error)) from error
    return model.getvalue()


def _training_error(vocab_size: int, message: str) -> ConfigError:
    """What the trainer complains about, without its source position."""
    where = f"--vocab-size {vocab_size}"
    if match := re.search(r"value <= (\d+)", message):
        return ConfigError(
            f"{where}: too large for this text, which yields at most {match[1]} pieces; ask for that, give more "
            "text, or take what it yields with --fit"
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return _TooManyCharactersError(
            f"{where}: too small for the characters of this text, which need {match[1]} pieces; ask for more, lower "
            "--character-coverage, or leave rare characters out with --fit"
        )
    return ConfigError(f"{where}: {' '.join(message.split())}")


def _sentences(
    inputs: Sequence[str], settings: BuildSettings, every: int, cased: bool, counts: Counter[str]
) -> Iterator[str]:
    """Every `every`-th sentence of the corpus, normalised as it will be when the model is used."""
    position = 0
    for task in plan_tasks(find_sources(inputs, (), settings), settings):
        for part in task.parts:
            for batch in read_documents(part, settings, counts):
                chosen = batch.sentences[-position % every :: every]
                position += len(batch.sentences)
                for sentence in normalise_texts(chosen, not cased, not cased):
                    for start in range(0, len(sentence), _MAX_SENTENCE_CHARACTERS):
                        yield sentence[start : start + _MAX_SENTENCE_CHARACTERS]


def _sampling_interval(inputs: Sequence[str], settings: BuildSettings, max_sentences: int) -> int:
    """1 for a corpus that fits into `max_sentences`, guessing 50 bytes for the shortest usual sentence."""
    total = sum(source.bytes for source in find_sources(inputs, (), settings))
    return max(1, total // (50 * max_sentences))


def _is_chinese(sentences: Sequence[str]) -> bool:
    text = "".join(sentences[:10_000])
    return len(re.findall("[\u4e00-\u9fff]", text)) > 0.3 * len(text)
