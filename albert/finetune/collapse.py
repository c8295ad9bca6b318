"""The collapse guard: fine-tuning of large ALBERTs that stays at the majority class is found and named.

It is the most reported problem of the predecessors (albert_pytorch #18, albert_zh #53 #56 #77 #152, google #197).
"""

from __future__ import annotations

from albert.finetune.preparation import Prepared
from albert.finetune.progress import Progress
from albert.finetune.settings import FinetuneSettings

_MARGIN = 0.005


def collapse_warning(prepared: Prepared, settings: FinetuneSettings, progress: Progress) -> str | None:
    """A sentence with the known cures if the best weights answer one class only; None if they do not."""
    metrics = progress.best_metrics
    if prepared.task.kind not in {"classification", "choice"} or len(progress.best_answers) != 1:
        return None
    if metrics["accuracy"] > metrics["majority_accuracy"] + _MARGIN:
        return None
    cures = [f"a lower --learning-rate than {settings.learning_rate:g} (try a third)"]
    if settings.warmup_steps == 0:
        cures.append("--warmup-steps (a tenth of all steps)")
    if settings.max_grad_norm == 0:
        cures.append("--max-grad-norm 1.0")
    if prepared.config.hidden_dropout_prob or prepared.config.attention_probs_dropout_prob:
        cures.append("--dropout 0")
    cures += ["more --epochs", "another --seed", "--reinit-pooler"]
    answer = _answer(prepared, progress.best_answers[0])
    return (
        f"collapsed: every dev example is answered '{answer}', accuracy {metrics['accuracy']:.4f} beside "
        f"{metrics['majority_accuracy']:.4f} of the majority class; known cures: {', '.join(cures)}; check "
        "also that num_attention_heads and ln_type in config.json are those of the pretraining"
    )


def _answer(prepared: Prepared, index: int) -> str:
    return prepared.labels[index] if prepared.labels else f"option {index + 1}"
