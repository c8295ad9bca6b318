"""TensorFlow checkpoints for the tests: their variables, a numpy forward by TensorFlow's names, a writer.

`python tests/unit/tf_albert.py DIRECTORY` (with TensorFlow installed) writes the files in tests/fixtures.
"""

import sys
from pathlib import Path

import numpy as np

SHAPES = {
    "vocab_size": 60,
    "embedding_size": 8,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
MODELS = {
    "google": {
        "layout": "google",
        "num_hidden_layers": 4,
        "num_hidden_groups": 2,
        "inner_group_num": 2,
        "slots": ("adam_m", "adam_v"),
    },
    "brightmart": {
        "layout": "brightmart",
        "ln_type": "preln",
        "num_hidden_layers": 3,
        "slots": ("lamb_m", "lamb_v"),
    },
    "hub": {
        "layout": "google",
        "num_hidden_layers": 3,
        "prefix": "module/",
        "without": "cls/seq_relationship",
    },
}


def config_fields(name):
    own = {k: v for k, v in MODELS[name].items() if k not in ("slots", "prefix", "without")}
    return {**SHAPES, **own}


def shapes(name):
    """Variable name -> shape, without slots."""
    c = {"num_hidden_groups": 1, "inner_group_num": 1, **config_fields(name)}
    vocab, embed, hidden, inner = (
        c[k] for k in ("vocab_size", "embedding_size", "hidden_size", "intermediate_size")
    )
    is_google = c["layout"] == "google"
    width = embed if is_google else hidden
    out = {"bert/embeddings/word_embeddings": (vocab, embed)}

    def dense(scope, rows, columns):
        out[f"{scope}/kernel"], out[f"{scope}/bias"] = (rows, columns), (columns,)

    def norm(scope, size):
        out[f"{scope}/gamma"], out[f"{scope}/beta"] = (size,), (size,)

    if not is_google:
        out["bert/embeddings/word_embeddings_2"] = (embed, hidden)
    out["bert/embeddings/position_embeddings"] = (c["max_position_embeddings"], width)
    out["bert/embeddings/token_type_embeddings"] = (2, width)
    norm("bert/embeddings/LayerNorm", width)
    if is_google:
        dense("bert/encoder/embedding_hidden_mapping_in", embed, hidden)
    for scope, attention, intermediate, output, norm_1, norm_2 in blocks(c):
        for part in ("query", "key", "value"):
            dense(f"{scope}/{attention}/self/{part}", hidden, hidden)
        dense(f"{scope}/{attention}/output/dense", hidden, hidden)
        dense(f"{scope}/{intermediate}/dense", hidden, inner)
        dense(f"{scope}/{output}/dense", inner, hidden)
        norm(f"{scope}/{norm_1}", hidden)
        norm(f"{scope}/{norm_2}", hidden)
    dense("bert/pooler/dense", hidden, hidden)
    dense("cls/predictions/transform/dense", hidden, width)
    norm("cls/predictions/transform/LayerNorm", width)
    out["cls/predictions/output_bias"] = (vocab,)
    out["cls/seq_relationship/output_weights"], out["cls/seq_relationship/output_bias"] = (2, hidden), (2,)
    return out


def blocks(c):
    """Scopes of every stored block: base, attention, intermediate, output, LayerNorm of both halves."""
    if c["layout"] == "brightmart":
        yield (
            "bert/encoder/layer_shared",
            "attention",
            "intermediate",
            "output",
            "attention/output/LayerNorm",
            "output/LayerNorm",
        )
        return
    for group in range(c["num_hidden_groups"]):
        for inner in range(c["inner_group_num"]):
            yield (
                f"bert/encoder/transformer/group_{group}/inner_group_{inner}",
                "attention_1",
                "ffn_1/intermediate",
                "ffn_1/intermediate/output",
                "LayerNorm",
                "LayerNorm_1",
            )


def variables(name):
    """Variable name -> value; the same for everybody."""
    rng = np.random.default_rng(sum(map(ord, name)))
    values = {}
    for variable, shape in shapes(name).items():
        value = rng.normal(0, 0.3, shape).astype(np.float32)
        values[variable] = value + np.float32(1) if variable.endswith("gamma") else value
    return values


def stored(name):
    """What the checkpoint holds: model variables, optimizer slots, the step."""
    options = MODELS[name]
    prefix, without = options.get("prefix", ""), options.get("without", "nothing")
    out = {f"{prefix}{n}": v for n, v in variables(name).items() if not n.startswith(without)}
    for slot in options.get("slots", ()):
        out |= {f"{n}/{slot}": np.full_like(v, 0.5) for n, v in variables(name).items()}
    return out | {"global_step": np.int64(125000)}


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


class NumpyAlbert:
    """Forward pass in float64 by TensorFlow's variable names."""

    def __init__(self, name):
        self.v = {n: x.astype(np.float64) for n, x in variables(name).items()}
        self.c = {"num_hidden_groups": 1, "inner_group_num": 1, "ln_type": "postln", **config_fields(name)}

    def dense(self, x, scope):
        return x @ self.v[f"{scope}/kernel"] + self.v[f"{scope}/bias"]

    def norm(self, x, scope):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * self.v[f"{scope}/gamma"] + self.v[f"{scope}/beta"]

    def attention(self, x, scope):
        batch, seq, hidden = x.shape
        heads = self.c["num_attention_heads"]

        def split(y):
            return y.reshape(batch, seq, heads, hidden // heads).transpose(0, 2, 1, 3)

        q, k, v = (split(self.dense(x, f"{scope}/self/{n}")) for n in ("query", "key", "value"))
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(hidden // heads)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        context = (weights @ v).transpose(0, 2, 1, 3).reshape(batch, seq, hidden)
        return self.dense(context, f"{scope}/output/dense")

    def layer(self, x, names):
        base, attention, intermediate, output, norm_1, norm_2 = names

        def feed_forward(y):
            return self.dense(gelu(self.dense(y, f"{base}/{intermediate}/dense")), f"{base}/{output}/dense")

        if self.c["ln_type"] == "preln":
            x = x + self.attention(self.norm(x, f"{base}/{norm_1}"), f"{base}/{attention}")
            return x + feed_forward(self.norm(x, f"{base}/{norm_2}"))
        x = self.norm(x + self.attention(x, f"{base}/{attention}"), f"{base}/{norm_1}")
        return self.norm(x + feed_forward(x), f"{base}/{norm_2}")

    def logits(self, ids, types):
        """MLM [batch, seq, vocab] and SOP [batch, 2] of full-length sequences."""
        v, c = self.v, self.c
        words = v["bert/embeddings/word_embeddings"]
        x = words[ids]
        if c["layout"] == "brightmart":
            x = x @ v["bert/embeddings/word_embeddings_2"]
        x = x + v["bert/embeddings/token_type_embeddings"][types]
        x = self.norm(
            x + v["bert/embeddings/position_embeddings"][: ids.shape[1]], "bert/embeddings/LayerNorm"
        )
        if c["layout"] == "google":
            x = self.dense(x, "bert/encoder/embedding_hidden_mapping_in")
        stored_blocks = list(blocks(c))
        inner = c["inner_group_num"]
        for layer in range(c["num_hidden_layers"]):
            group = layer * c["num_hidden_groups"] // c["num_hidden_layers"]
            for i in range(inner):
                x = self.layer(x, stored_blocks[group * inner + i])
        pooled = np.tanh(self.dense(x[:, 0], "bert/pooler/dense"))
        sop = pooled @ v["cls/seq_relationship/output_weights"].T + v["cls/seq_relationship/output_bias"]
        x = gelu(self.dense(x, "cls/predictions/transform/dense"))
        x = self.norm(x, "cls/predictions/transform/LayerNorm")
        if c["layout"] == "brightmart":
            x = x @ v["bert/embeddings/word_embeddings_2"].T
        return x @ words.T + v["cls/predictions/output_bias"], sop


def write(prefix, values):
    """Write a checkpoint with TensorFlow's own saver."""
    import tensorflow as tf

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        saved = [tf.compat.v1.Variable(value, name=name) for name, value in values.items()]
        session.run(tf.compat.v1.variables_initializer(saved))
        tf.compat.v1.train.Saver(saved).save(session, str(prefix), write_meta_graph=False)


if __name__ == "__main__":
    for model in MODELS:
        write(Path(sys.argv[1]) / f"{model}.ckpt", stored(model))
