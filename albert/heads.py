"""Heads on the encoder: pretraining, sequence and token classification, spans, multiple choice.

All take packed batches. Where Hugging Face has the same head the logits are the same.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from albert.activations import ACTIVATIONS
from albert.batches import PackedBatch, PretrainBatch
from albert.blocks import NO_SENTENCE_ORDER
from albert.cross_entropy import linear_cross_entropy
from albert.linear import Linear, Product
from albert.model_config import ModelConfig
from albert.modeling import AlbertAttention, AlbertModel, initialize_weights

Problem = Literal["single_label", "multi_label", "regression"]
"""What a sequence classifier predicts."""


class PretrainOutput(NamedTuple):
    """Sums over the batch, 0-d: fp32 losses and int64 counts.

    A tuple, because the hooks of ZeRO-3 look for tensors in tuples only.
    """

    mlm_loss_sum: Tensor
    """Sum of the cross entropies of the masked positions."""
    sop_loss_sum: Tensor
    """Sum of the cross entropies of the sequences that have a sentence-order label."""
    mlm_correct: Tensor | None
    """Masked positions predicted right; None unless asked for."""
    sop_correct: Tensor | None
    """Sequence orders predicted right; None unless asked for."""


class AlbertHead(nn.Module):
    """What all models with a head have in common: the encoder, its switches, and initialisation."""

    def __init__(self, config: ModelConfig, *, has_pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.albert = AlbertModel(config, has_pooler=has_pooler)

    @property
    def activation_checkpointing(self) -> bool:
        """Whether layer activations are computed again in the backward pass instead of kept."""
        return self.albert.encoder.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, enabled: bool) -> None:
        self.albert.encoder.activation_checkpointing = enabled

    def compile_layers(self, **options: Any) -> None:
        """Compile the blocks; code that many layer uses share is compiled once, for all numbers of tokens.

        Left to find out what varies, the compiler would make more versions than it allows, and give up in silence.

        Args:
            options: of `torch.compile`.
        """
        for block in (*self.albert.encoder.attention, *self.albert.encoder.feed_forward):
            block.compile(**{"dynamic": True, **options})

    def use_product(self, product: Product) -> None:
        """Compute the matrix products of the blocks with another function than `albert.linear.linear`."""
        for block in (*self.albert.encoder.attention, *self.albert.encoder.feed_forward):
            for module in block.modules():
                if isinstance(module, AlbertAttention | Linear):
                    module.product = product


class MaskedLanguageHead(nn.Module):
    """Transform of a hidden state before it is decoded with the word embeddings, and the output bias.

    Google transforms to the embedding size, brightmart stays at the hidden size and decodes through the tied
    projection.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.embedding_size if config.layout == "google" else config.hidden_size
        self.dense = Linear(config.hidden_size, width)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """[preds, hidden] to [preds, embed or hidden]."""
        return self.LayerNorm(self.activation(self.dense(hidden)))


class AlbertForPreTraining(AlbertHead):
    """Masked language modelling on the masked positions only, and sentence-order prediction."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__(config)
        self.predictions = MaskedLanguageHead(config)
        self.sop_classifier = nn.Linear(config.hidden_size, 2)
        initialize_weights(self, config.initializer_range, seed)

    def forward(self, batch: PretrainBatch, with_accuracy: bool = False) -> PretrainOutput:
        """Summed losses of a batch, and counts of right predictions where asked for."""
        hidden, pooled = self.albert(batch.sequences, needed=batch.masked_lm_indices)
        mlm_loss_sum, mlm_correct = linear_cross_entropy(
            *self._decoder_product(hidden), batch.masked_lm_labels, with_accuracy
        )
        sop_logits, sop_labels = _for_loss(self.sop_classifier(pooled)), batch.sentence_order_labels
        return PretrainOutput(
            mlm_loss_sum,
            F.cross_entropy(sop_logits, sop_labels, reduction="sum", ignore_index=NO_SENTENCE_ORDER),
            mlm_correct,
            _count_correct(sop_logits, sop_labels) if with_accuracy else None,
        )

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden states: [preds, hidden] to [preds, vocab]."""
        return F.linear(*self._decoder_product(hidden))

    def _decoder_product(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [preds, embed], weight [vocab, embed] and bias [vocab] whose product is the vocabulary logits."""
        embeddings = self.albert.embeddings
        rows = embeddings.to_embedding_size(self.predictions(hidden))
        return rows, embeddings.word_embeddings.weight, self.predictions.bias

    def forward_padded(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All logits of padded [batch, seq] input, for export and comparison.

        Returns:
            prediction_logits [batch, seq, vocab] and sop_logits [batch, 2].
        """
        hidden, pooled = self.albert.forward_padded(input_ids, token_type_ids, attention_mask)
        return self.mlm_logits(hidden), self.sop_classifier(pooled)


def _for_loss(logits: Tensor) -> Tensor:
    """Logits in fp32, or in fp64 where they are: a loss in 16 bits loses digits."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many rows have their largest logit at the label; ignored labels never match."""
    return (logits.argmax(-1) == labels).sum()


class AlbertForSequenceClassification(AlbertHead):
    """One label, several labels or a number for each sequence, from the pooled first token."""

    def __init__(
        self, config: ModelConfig, num_labels: int, problem: Problem = "single_label", seed: int = 0
    ) -> None:
        super().__init__(config)
        self.problem = problem
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        initialize_weights(self, config.initializer_range, seed)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits, or predicted numbers, [batch, num_labels]."""
        _, pooled = self.albert(batch, needed=batch.input_ids[:0])
        return self.classifier(self.dropout(pooled))

    def forward_padded(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [batch, num_labels] of padded [batch, seq] input, for export."""
        _, pooled = self.albert.forward_padded(input_ids, token_type_ids, attention_mask)
        return self.classifier(self.dropout(pooled))

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over the sequences of a batch, in fp32; divide by their number for the mean.

        Args:
            logits: [batch, num_labels]
            labels: [batch] int64 for single_label (-100 is ignored), [batch, num_labels] of 0 and 1 for
                multi_label, [batch] or [batch, num_labels] numbers for regression. The losses are cross
                entropy, mean binary cross entropy over the labels, and mean squared error over them.
        """
        logits = _for_loss(logits)
        if self.problem == "single_label":
            return F.cross_entropy(logits, labels, reduction="sum")
        labels = labels.to(logits.dtype).view_as(logits)
        if self.problem == "multi_label":
            losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        else:
            losses = F.mse_loss(logits, labels, reduction="none")
        return losses.mean(-1).sum()


class AlbertForTokenClassification(AlbertHead):
    """A label for each token."""

    def __init__(self, config: ModelConfig, num_labels: int, seed: int = 0) -> None:
        super().__init__(config, has_pooler=False)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.token_classifier = nn.Linear(config.hidden_size, num_labels)
        initialize_weights(self, config.initializer_range, seed)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits [tokens, num_labels]."""
        hidden, _ = self.albert(batch)
        return self.token_classifier(self.dropout(hidden))

    def forward_padded(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [batch, seq, num_labels] of padded [batch, seq] input, for export."""
        hidden, _ = self.albert.forward_padded(input_ids, token_type_ids, attention_mask)
        return self.token_classifier(self.dropout(hidden))

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over tokens of the cross entropy, in fp32; labels [tokens] int64, -100 is ignored."""
        return F.cross_entropy(_for_loss(logits), labels, reduction="sum")


class AlbertForQuestionAnswering(AlbertHead):
    """Start and end of an answer inside each sequence."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__(config, has_pooler=False)
        self.span_classifier = nn.Linear(config.hidden_size, 2)
        initialize_weights(self, config.initializer_range, seed)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Logits of start and end, each [tokens]."""
        hidden, _ = self.albert(batch)
        start, end = self.span_classifier(hidden).unbind(-1)
        return start, end

    def forward_padded(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of start and end, each [batch, seq], of padded [batch, seq] input, for export."""
        hidden, _ = self.albert.forward_padded(input_ids, token_type_ids, attention_mask)
        start, end = self.span_classifier(hidden).unbind(-1)
        return start, end

    def loss_sum(self, logits: Tensor, positions: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Sum over sequences of the cross entropy of one end of the span, in fp32.

        Args:
            logits: [tokens], start or end.
            positions: [batch] int64, the right token counted inside its sequence; -100 is ignored.
            lengths: lengths of the sequences of the batch.
        """
        rows = nn.utils.rnn.pad_sequence(
            list(_for_loss(logits).split(lengths)), batch_first=True, padding_value=-torch.inf
        )
        return F.cross_entropy(rows, positions, reduction="sum")


class AlbertForMultipleChoice(AlbertHead):
    """Which of several sequences is right; the choices of a question are consecutive in the batch."""

    def __init__(self, config: ModelConfig, num_choices: int, seed: int = 0) -> None:
        super().__init__(config)
        self.num_choices = num_choices
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.choice_classifier = nn.Linear(config.hidden_size, 1)
        initialize_weights(self, config.initializer_range, seed)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits [questions, num_choices] of questions * num_choices sequences."""
        _, pooled = self.albert(batch, needed=batch.input_ids[:0])
        return self.choice_classifier(self.dropout(pooled)).view(-1, self.num_choices)

    def forward_padded(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score [batch, 1] of each padded sequence, [batch, seq] input, for export."""
        _, pooled = self.albert.forward_padded(input_ids, token_type_ids, attention_mask)
        return self.choice_classifier(self.dropout(pooled))

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over questions of the cross entropy, in fp32; labels [questions] int64."""
        return F.cross_entropy(_for_loss(logits), labels, reduction="sum")
