"""Documents to blocks of finished examples: pairs, special tokens, word starts, masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from albert.blocks import MAX_EXAMPLES_PER_BLOCK, Block
from albert.masking import MaskingPolicy, example_keys, mask_examples
from albert.tokenization import Tokenizer
from data_prep.segments import PairPolicy, Pairs, TokenizedDocuments, make_pairs, pack_documents
from data_prep.settings import BuildSettings

_CLAUSE_ENDS = ",;:，；：、—"


@dataclass(frozen=True)
class ExampleMaker:
    """Everything that turns documents into examples, for one tokenizer and one set of settings."""

    cls_id: int
    sep_id: int
    word_starts: NDArray[np.bool_]
    """[vocab]"""
    clause_ends: NDArray[np.bool_]
    """[vocab] pieces after which a long sentence may be split"""
    pairs: PairPolicy
    pack: bool
    """Whether short documents are joined"""
    masks: MaskingPolicy
    seed: int

    @staticmethod
    def of(settings: BuildSettings, tokenizer: Tokenizer) -> ExampleMaker:
        """The maker that settings and vocabulary ask for."""
        pieces = tokenizer.pieces(range(tokenizer.vocab_size))
        return ExampleMaker(
            cls_id=tokenizer.cls_id,
            sep_id=tokenizer.sep_id,
            word_starts=_word_starts(tokenizer, settings),
            clause_ends=np.array([piece[-1:] in _CLAUSE_ENDS and piece != "" for piece in pieces]),
            pairs=PairPolicy(settings.max_seq_length, settings.short_seq_prob, settings.pairs),
            pack=settings.pack_short_documents,
            masks=MaskingPolicy.of_tokenizer(
                tokenizer,
                masked_lm_prob=settings.masked_lm_prob,
                max_predictions_per_seq=settings.max_predictions,
                max_ngram=settings.max_ngram,
                favor=settings.favor_ngram,
            ),
            seed=settings.seed,
        )

    def make_blocks(
        self,
        documents: TokenizedDocuments,
        coordinates: tuple[int, ...],
        copies: range,
        counts: Counter[str],
    ) -> Iterator[Block]:
        """Passes of examples over documents, one for each of `copies`, masked together.

        Coordinates and copy seed all randomness, so that a copy is the same whichever it is made with.
        """
        if self.pack:
            documents = pack_documents(documents, self.pairs.max_num_tokens)
        passes, keys = [], []
        for copy in copies:
            rng = np.random.default_rng([self.seed, *coordinates, copy])
            pairs = make_pairs(documents, self.clause_ends, self.pairs, rng)
            passes.append(pairs.reorder(rng.permutation(pairs.num_examples)))
            keys.append(example_keys(self.seed, *coordinates, copy, np.arange(pairs.num_examples)))
        pairs = Pairs.concatenate(passes)
        ids, lengths, a_lengths = assemble(documents.ids, pairs, self.cls_id, self.sep_id)
        starts = self._starts(documents, pairs, ids, lengths, a_lengths)
        masked = mask_examples(ids, lengths, a_lengths, starts, np.concatenate(keys), self.masks)
        for n, drawn in enumerate(masked.drawn_ngrams.tolist(), 1):
            counts[f"drawn_ngrams.{n}"] += drawn
        counts["cut_ngrams"] += masked.cut_ngrams
        tokens = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        preds = np.concatenate(([0], np.cumsum(masked.num_masked, dtype=np.int64)))
        for begin in range(0, len(lengths), MAX_EXAMPLES_PER_BLOCK):
            end = min(begin + MAX_EXAMPLES_PER_BLOCK, len(lengths))
            token_range, pred_range = slice(tokens[begin], tokens[end]), slice(preds[begin], preds[end])
            yield Block(
                input_ids=masked.input_ids[token_range],
                lengths=lengths[begin:end],
                segment_a_lengths=a_lengths[begin:end],
                masked_lm_positions=masked.positions[pred_range],
                masked_lm_labels=masked.labels[pred_range],
                num_masked=masked.num_masked[begin:end],
                sentence_order_labels=pairs.labels[begin:end],
                word_starts=np.packbits(starts[token_range]),
            )

    def _starts(
        self,
        documents: TokenizedDocuments,
        pairs: Pairs,
        ids: NDArray[Any],
        lengths: NDArray[np.uint16],
        a_lengths: NDArray[np.uint16],
    ) -> NDArray[np.bool_]:
        """[tokens] where words begin; a segment always begins with a word, however it was cut."""
        if documents.word_starts is None:
            starts = self.word_starts[ids]
        else:
            starts, _, _ = assemble(documents.word_starts, pairs, False, False)
        offsets = np.cumsum(lengths, dtype=np.int64) - lengths
        starts[offsets + 1] = True
        has_b = np.flatnonzero(a_lengths < lengths)
        starts[offsets[has_b] + a_lengths[has_b]] = True
        return starts


def _word_starts(tokenizer: Tokenizer, settings: BuildSettings) -> NDArray[np.bool_]:
    """[vocab] pieces that begin a unit of masking; with whole_words none, all but special tokens do."""
    table = tokenizer.word_start_table()
    if settings.whole_words == "none":
        table[tokenizer.ordinary_ids()] = True
    return table


def assemble(
    flat: NDArray[Any], pairs: Pairs, cls_value: int, sep_value: int
) -> tuple[NDArray[Any], NDArray[np.uint16], NDArray[np.uint16]]:
    """Lay the examples of `pairs` end to end with their special tokens.

    Returns:
        Values [tokens] in the type of `flat`, lengths [examples], lengths of `[CLS] A [SEP]` [examples].
    """
    first = pairs.first_end - pairs.first_start
    second = pairs.second_end - pairs.second_start
    a_lengths = first + 2
    lengths = a_lengths + second + (second > 0)
    offsets = np.cumsum(lengths) - lengths
    out = np.full(int(lengths.sum()), sep_value, flat.dtype)
    out[offsets] = cls_value
    ranges = zip(
        (offsets + 1).tolist(),
        pairs.first_start.tolist(),
        first.tolist(),
        (offsets + a_lengths).tolist(),
        pairs.second_start.tolist(),
        second.tolist(),
        strict=True,
    )
    for to_a, from_a, len_a, to_b, from_b, len_b in ranges:
        out[to_a : to_a + len_a] = flat[from_a : from_a + len_a]
        out[to_b : to_b + len_b] = flat[from_b : from_b + len_b]
    return out, lengths.astype(np.uint16), a_lengths.astype(np.uint16)
