"""The collapse guard: fine-tuning of large ALBERTs that stays at the majority class is found and named.

It is the most reported problem of the predecessors (albert_pytorch #18, albert_zh #53 #56 #77 #152, google #197).
"""

from __future__ import annotations

import numpy as np

from albert.finetune.loop import Progress
from albert.finetune.preparation import Prepared
from albert.finetune.settings import FinetuneSettings

_MARGIN = 0.005


def collapse_warning(prepared: Prepared, settings: FinetuneSettings, progress: Progress) -> str | None:
    """A sentence with the known cures if the best weights answer one class only; None if they do not."""
    rows = progress.best_rows
    if prepared.task.kind not in {"classification", "choice"} or rows is None:
        return None
    is_constant = len(np.unique(rows.argmax(axis=1))) == 1
    metrics = progress.best_metrics
    if not is_constant or metrics["accuracy"] > metrics["majority_accuracy"] + _MARGIN:
        return None
    cures = [f"a lower --learning-rate than {settings.learning_rate:g} (try a third)"]
    if settings.warmup_steps == 0:
        cures.append("--warmup-steps (a tenth of all steps)")
    if settings.max_grad_norm == 0:
        cures.append("--max-grad-norm 1.0")
    if prepared.config.hidden_dropout_prob or prepared.config.attention_probs_dropout_prob:
        cures.append("--dropout 0")
    cures += ["more --epochs", "another --seed", "--reinit-pooler"]
    return (
        f"collapsed: every dev example is answered '{_answer(prepared, rows)}', accuracy {metrics['accuracy']:.4f} "
        f"beside {metrics['majority_accuracy']:.4f} of the majority class; known cures: {', '.join(cures)}; check "
        "also that num_attention_heads and ln_type in config.json are those of the pretraining"
    )


def _answer(prepared: Prepared, rows: np.ndarray) -> str:
    index = int(rows[0].argmax())
    return prepared.labels[index] if prepared.labels else f"option {index + 1}"
