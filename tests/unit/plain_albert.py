"""ALBERT written down from the formulas, padded and without any cleverness: the reference of the tests.

Takes a model's parameters by name; differentiable, so that gradients can be compared too.
"""

import torch


def layer_norm(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def activate(x, name):
    if name == "relu":
        return x.clamp(min=0)
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class PlainAlbert:
    def __init__(self, config, parameters):
        self.config, self.parameters = config, parameters

    def dense(self, x, name):
        return x @ self.parameters[f"{name}.weight"].T + self.parameters[f"{name}.bias"]

    def norm(self, x, name):
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        return layer_norm(x, weight, bias, self.config.layer_norm_eps)

    def table(self, name):
        return self.parameters[f"albert.embeddings.{name}.weight"]

    @property
    def projection(self):
        """[embed, hidden] of brightmart's factorised embedding; the identity where there is none."""
        if "albert.embeddings.word_embeddings_2.weight" in self.parameters:
            return self.table("word_embeddings_2").T
        return torch.eye(self.config.hidden_size, dtype=self.table("word_embeddings").dtype)

    def embed(self, ids, types):
        words = self.table("word_embeddings")[ids]
        rest = self.table("token_type_embeddings")[types] + self.table("position_embeddings")[: ids.shape[1]]
        if self.config.layout == "brightmart":
            return self.norm(words @ self.projection + rest, "albert.embeddings.LayerNorm")
        return self.dense(
            self.norm(words + rest, "albert.embeddings.LayerNorm"),
            "albert.encoder.embedding_hidden_mapping_in",
        )

    def attention(self, x, mask, prefix):
        config = self.config
        batch, seq, hidden = x.shape
        head_dim = hidden // config.num_attention_heads

        def heads(name):
            return self.dense(x, f"{prefix}.{name}").view(batch, seq, -1, head_dim).permute(0, 2, 1, 3)

        scores = heads("query") @ heads("key").transpose(-1, -2) / head_dim**0.5
        scores = scores + torch.where(mask, 0.0, -torch.inf)[:, None, None, :].to(x.dtype)
        context = (scores.softmax(-1) @ heads("value")).permute(0, 2, 1, 3).reshape(batch, seq, hidden)
        return self.dense(context, f"{prefix}.dense")

    def feed_forward(self, x, prefix):
        inner = activate(self.dense(x, f"{prefix}.intermediate"), self.config.hidden_act)
        return self.dense(inner, f"{prefix}.output")

    def layer(self, x, mask, attention, feed_forward):
        if self.config.ln_type == "preln":
            x = x + self.attention(self.norm(x, f"{attention}.LayerNorm"), mask, attention)
            return x + self.feed_forward(self.norm(x, f"{feed_forward}.LayerNorm"), feed_forward)
        x = self.norm(x + self.attention(x, mask, attention), f"{attention}.LayerNorm")
        return self.norm(x + self.feed_forward(x, feed_forward), f"{feed_forward}.LayerNorm")

    def blocks(self):
        """Names of the blocks of every layer use, in order."""
        config = self.config
        for layer in range(config.num_hidden_layers):
            group = layer * config.num_hidden_groups // config.num_hidden_layers
            for inner in range(config.inner_group_num):
                shared = group * config.inner_group_num + inner
                a = layer if config.share_type in ("ffn", "none") else shared
                f = layer if config.share_type in ("attention", "none") else shared
                yield f"albert.encoder.attention.{a}", f"albert.encoder.feed_forward.{f}"

    def encode(self, ids, types, mask):
        """Hidden states [batch, seq, hidden] and pooled [batch, hidden]."""
        x = self.embed(ids, types)
        for attention, feed_forward in self.blocks():
            x = self.layer(x, mask, attention, feed_forward)
        if self.config.final_ln:
            x = self.norm(x, "albert.encoder.LayerNorm")
        return x, torch.tanh(self.dense(x[:, 0], "albert.pooler"))

    def logits(self, ids, types, mask):
        """MLM [batch, seq, vocab] and SOP [batch, 2]."""
        x, pooled = self.encode(ids, types, mask)
        x = activate(self.dense(x, "predictions.dense"), self.config.hidden_act)
        x = self.norm(x, "predictions.LayerNorm")
        if self.config.layout == "brightmart":
            x = x @ self.projection.T
        mlm = x @ self.table("word_embeddings").T + self.parameters["predictions.bias"]
        return mlm, self.dense(pooled, "sop_classifier")
