"""The ALBERT encoder (Lan et al. 2020, arXiv 1909.11942) on packed tokens.

One encoder serves Google's and brightmart's layouts, post-LN and pre-LN, and every way to share layers:
it holds a few attention and feed-forward blocks and applies them as often as the configuration says.
Padding is never computed: the batch is `[tokens, hidden]` from the embeddings on. Queries, keys and
values are separate parameters, so that checkpoints and layer-wise optimizers see them apart, and are
joined into one matrix once per forward pass.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from albert.activations import ACTIVATIONS
from albert.attention import (
    KeptTokens,
    PackedLayout,
    PaddedLayout,
    attend,
    attend_kept,
    kept_tokens,
    packed_layout,
)
from albert.batches import PackedBatch
from albert.linear import Linear, PackedWeights, Product, linear, rows_to_add, split_features
from albert.model_config import ModelConfig


class AlbertEmbeddings(nn.Module):
    """Sum of word, position and type embeddings, normalised.

    Google adds at the embedding size and projects afterwards (in the encoder); brightmart projects the word
    embedding first, without bias, and adds at the hidden size. brightmart with equal sizes has no projection.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        is_google = config.layout == "google"
        width = config.embedding_size if is_google else config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.word_embeddings_2: nn.Linear | None = None
        if not is_google and config.embedding_size != config.hidden_size:
            self.word_embeddings_2 = nn.Linear(config.embedding_size, config.hidden_size, bias=False)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Embed [tokens] ids; returns [tokens, embed] (google) or [tokens, hidden] (brightmart)."""
        words = self.word_embeddings(input_ids)
        if self.word_embeddings_2 is not None:
            words = self.word_embeddings_2(words)
        types, positions = self.token_type_embeddings(token_type_ids), self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(words + types + positions))

    def to_embedding_size(self, hidden: Tensor) -> Tensor:
        """What the tied word embeddings decode: [preds, embed or hidden] to [preds, embed]."""
        return hidden if self.word_embeddings_2 is None else hidden @ self.word_embeddings_2.weight


class AlbertAttention(nn.Module):
    """Self-attention block with its residual and LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.is_preln = config.ln_type == "preln"
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.dense = Linear(hidden, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.product: Product = linear
        """Computes the joined projection."""

    def joined_projection(self) -> tuple[Tensor, Tensor]:
        """Weight [3 * hidden, hidden] and bias [3 * hidden] of query, key and value."""
        parts = (self.query, self.key, self.value)
        return torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        layout: PackedLayout | PaddedLayout,
        kept: KeptTokens | None = None,
    ) -> Tensor:
        """Attend; `weight` and `bias` are this block's joined projection.

        [tokens, hidden] to the same, or to [kept, hidden] where only the tokens of `kept` are asked for.
        """
        source = self.LayerNorm(hidden) if self.is_preln else hidden
        dropout = self.attention_dropout if self.training else 0.0
        if kept is None:
            context = attend(self._heads(self.product(source, weight, bias), 3), layout, dropout)
        else:
            context = self._attend_kept(source, weight, bias, cast(PackedLayout, layout), kept, dropout)
            hidden = hidden.index_select(0, kept.indices)
        output = self.dropout(self.dense(context)).add_(hidden)
        return output if self.is_preln else self.LayerNorm(output)

    def _attend_kept(
        self,
        source: Tensor,
        weight: Tensor,
        bias: Tensor,
        layout: PackedLayout,
        kept: KeptTokens,
        dropout: float,
    ) -> Tensor:
        """Keys and values of all tokens, queries of the kept ones: [tokens, hidden] to [kept, hidden]."""
        sizes = (len(weight) // 3, len(weight) * 2 // 3)
        (query_weight, other_weight), (query_bias, other_bias) = (
            split_features(weight, sizes),
            bias.split(sizes),
        )
        query = self.product(source.index_select(0, kept.indices), query_weight, query_bias)
        key_value = self._heads(self.product(source, other_weight, other_bias), 2)
        return attend_kept(self._heads(query, 1)[:, 0], key_value, layout, kept, dropout)

    def _heads(self, projected: Tensor, parts: int) -> Tensor:
        """[tokens, parts * hidden] as [tokens, parts, heads, head_dim]."""
        return projected.unflatten(1, (parts, self.num_heads, -1))


class AlbertFeedForward(nn.Module):
    """Feed-forward block with its residual and LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_preln = config.ln_type == "preln"
        self.intermediate = Linear(config.hidden_size, config.intermediate_size)
        self.output = Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] to the same."""
        source = self.LayerNorm(hidden) if self.is_preln else hidden
        inner = self.activation(self.intermediate(source))
        output = self.dropout(self.output(inner)).add_(hidden)
        return output if self.is_preln else self.LayerNorm(output)


def block_of_use(config: ModelConfig) -> tuple[list[int], list[int]]:
    """Which attention block and which feed-forward block each layer use takes.

    `share_type` names what is shared: `attention` has one attention block for all layers and a
    feed-forward block for each. Google's groups: a group serves a contiguous run of layers, each of
    which applies the group's inner layers in turn.
    """
    layers, groups, inner = config.num_hidden_layers, config.num_hidden_groups, config.inner_group_num
    if config.share_type != "all":
        own, shared = list(range(layers)), [0] * layers
        return (
            shared if config.share_type == "attention" else own,
            shared if config.share_type == "ffn" else own,
        )
    layers_per_group = layers // groups
    uses = [(layer // layers_per_group) * inner + i for layer in range(layers) for i in range(inner)]
    return uses, uses


class AlbertEncoder(nn.Module):
    """The blocks and the order in which they are applied."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_of_use, self.feed_forward_of_use = block_of_use(config)
        self.embedding_hidden_mapping_in: nn.Linear | None = None
        if config.layout == "google":
            self.embedding_hidden_mapping_in = Linear(config.embedding_size, config.hidden_size)
        self.attention = nn.ModuleList(AlbertAttention(config) for _ in range(max(self.attention_of_use) + 1))
        self.feed_forward = nn.ModuleList(
            AlbertFeedForward(config) for _ in range(max(self.feed_forward_of_use) + 1)
        )
        self.LayerNorm: nn.LayerNorm | None = None
        if config.final_ln:
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation_checkpointing = False
        """Keep only the input of each layer use and compute the rest again in the backward pass."""

    def forward(
        self, hidden: Tensor, layout: PackedLayout | PaddedLayout, kept: KeptTokens | None = None
    ) -> Tensor:
        """[tokens, embed or hidden] from the embeddings to [tokens, hidden].

        With `kept`, to [kept, hidden]: the last layer gives no other tokens, of which it needs keys and values only.
        """
        if self.embedding_hidden_mapping_in is not None:
            hidden = self.embedding_hidden_mapping_in(hidden)
        joined = [block.joined_projection() for block in self.attention]  # type: ignore[operator]
        packed, last = PackedWeights(), len(self.attention_of_use) - 1
        for use, (a, f) in enumerate(zip(self.attention_of_use, self.feed_forward_of_use, strict=True)):
            inputs = (hidden, a, f, joined[a], layout, kept if use == last else None, packed)
            if self.activation_checkpointing and self.training:
                # The reentrant kind fails under ZeRO-2/3 when a layer is used more than once.
                hidden = checkpoint(self._layer, *inputs, use_reentrant=False)
            else:
                hidden = self._layer(*inputs)
        return hidden if self.LayerNorm is None else self.LayerNorm(hidden)

    def _layer(
        self,
        hidden: Tensor,
        a: int,
        f: int,
        joined: tuple[Tensor, Tensor],
        layout: PackedLayout | PaddedLayout,
        kept: KeptTokens | None,
        packed: PackedWeights,
    ) -> Tensor:
        with packed.in_use(kept is None and self.attention_of_use[:-1].count(a) > 1):
            hidden = self.attention[a](hidden, *joined, layout, kept)
        with packed.in_use(kept is None and self.feed_forward_of_use[:-1].count(f) > 1):
            return self.feed_forward[f](hidden)


class AlbertModel(nn.Module):
    """Embeddings, encoder and pooler."""

    def __init__(self, config: ModelConfig, *, has_pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = AlbertEmbeddings(config)
        self.encoder = AlbertEncoder(config)
        self.pooler: nn.Linear | None = None
        if has_pooler:
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, batch: PackedBatch, needed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Encode packed sequences.

        Args:
            batch: packed sequences.
            needed: [needed] indices of the tokens that a head uses besides the first of each sequence; None for all.
                The last layer then gives no others, which saves up to five sixths of it; the result is the same.

        Returns:
            sequence_output [tokens, hidden] or [needed, hidden], and pooled_output [batch, hidden] of the first
            token of each sequence (None without a pooler).
        """
        embedded = self.embeddings(batch.input_ids, batch.token_type_ids, batch.position_ids)
        num_tokens, first = len(embedded), batch.cu_seqlens[:-1]
        filler = self._rows_to_add(num_tokens, embedded)
        layout = packed_layout(batch, filler)
        if filler:
            embedded = F.pad(embedded, (0, 0, 0, filler))
        if needed is None:
            hidden = self.encoder(embedded, layout)[:num_tokens]
            return hidden, self._pool(hidden.index_select(0, first))
        wanted = torch.cat([first, needed])
        again = wanted[:1].expand(self._rows_to_add(len(wanted), embedded))
        kept, places = kept_tokens(torch.cat([wanted, again]), layout.cu_seqlens)
        hidden = self.encoder(embedded, layout, kept).index_select(0, places[: len(wanted)])
        return hidden[len(first) :], self._pool(hidden[: len(first)])

    def forward_padded(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Encode padded sequences, for export and comparison.

        Args:
            input_ids: [batch, seq]
            token_type_ids: [batch, seq]
            attention_mask: [batch, seq], nonzero for real tokens.

        Returns:
            sequence_output [batch, seq, hidden] (undefined at padding), and pooled_output [batch, hidden]
            (None without a pooler).
        """
        batch, seq = input_ids.shape
        positions = torch.arange(seq, device=input_ids.device).repeat(batch)
        embedded = self.embeddings(input_ids.flatten(), token_type_ids.flatten(), positions)
        hidden = self.encoder(embedded, PaddedLayout(attention_mask.bool()))
        hidden = hidden.unflatten(0, (batch, seq))
        return hidden, self._pool(hidden[:, 0])

    @staticmethod
    def _rows_to_add(number: int, like: Tensor) -> int:
        """Without a graph, `linear` leaves the products to torch, which takes any number of rows."""
        return rows_to_add(number, like) if torch.is_grad_enabled() else 0

    def _pool(self, first: Tensor) -> Tensor | None:
        """Pooled output of the first tokens [batch, hidden]."""
        return None if self.pooler is None else torch.tanh(self.pooler(first))


def initialize_weights(model: nn.Module, std: float, seed: int) -> None:
    """Initialise as Google: weights truncated normal at two `std`, biases 0, LayerNorm 1 and 0.

    Deterministic in `seed`, whatever the global generators hold. Parameters on the meta device are left
    alone.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
            else:
                nn.init.constant_(parameter, float(name.endswith("LayerNorm.weight")))
