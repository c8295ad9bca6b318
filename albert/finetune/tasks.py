"""The table of fine-tuning tasks: files, columns, labels, metric and published recipe. Imports no torch.

A new task is a row here, or a small YAML file (`--task custom`, see `custom.py`). Sources of the recipes:
`run_glue.sh` and README of google-research/albert, `run_classifier_clue.sh` of brightmart/albert_zh, the CLUE
README, the LCQMC scripts of albert_pytorch.
"""

from __future__ import annotations

from albert.errors import ConfigError
from albert.finetune.task_definition import Column, Columns, Recipe, Task


def _row_files(prefix: str = "") -> dict[str, tuple[str, ...]]:
    """train, dev and test in every row form."""
    suffixes = ("tsv", "txt", "csv", "json", "jsonl")
    return {
        split: tuple(f"{prefix}{split}.{suffix}" for suffix in suffixes) for split in ("train", "dev", "test")
    }


_FIRST = ("sentence1", "text_a", "query1", "question1", "premise")
_SECOND = ("sentence2", "text_b", "query2", "question2", "hypothesis")
_LABEL = ("label", "gold_label", "labels", "score")
_PAIR = Columns(Column(_FIRST, 0), Column(_SECOND, 1), Column(_LABEL, 2), Column(("id",)))
_SINGLE = Columns(Column(("sentence", "text", "text_a"), 0), None, Column(_LABEL, 1), Column(("id",)))
_BINARY = ("0", "1")
_NLI = ("entailment", "neutral", "contradiction")
_CLUE_RUN = "brightmart run_classifier_clue.sh"
_GOOGLE_RUN = "google run_glue.sh"
_GLUE_SPLITS = {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}


def _clue(name: str, recipe: Recipe, summary: str, **other: object) -> Task:
    fields: dict[str, object] = {
        "kind": "classification",
        "metric": "accuracy",
        "files": _row_files(),
        "columns": _PAIR,
        "submission": ("clue", f"{name}_predict.json"),
    }
    return Task(name=name, summary=summary, recipe=recipe, **{**fields, **other})  # type: ignore[arg-type]


def _glue(name: str, recipe: Recipe, summary: str, upload: str, **other: object) -> Task:
    fields: dict[str, object] = {
        "kind": "classification",
        "metric": "accuracy",
        "files": _GLUE_SPLITS,
        "labels": _BINARY,
        "submission": ("glue", f"{upload}.tsv"),
    }
    return Task(name=name, summary=summary, recipe=recipe, **{**fields, **other})  # type: ignore[arg-type]


def _google(rate: float, batch: int, steps: int, warmup: int) -> Recipe:
    return Recipe(rate, batch, steps=steps, warmup_steps=warmup, max_seq_length=512, source=_GOOGLE_RUN)


def _epochs(rate: float, batch: int, epochs: float, length: int = 128, source: str = _CLUE_RUN) -> Recipe:
    return Recipe(rate, batch, epochs=epochs, max_seq_length=length, source=source)


def _demo_task() -> Task:
    return Task(
        "demo",
        "classification",
        "the demo's sentence pairs, in their order or not",
        "accuracy",
        Recipe(5e-4, 32, epochs=2, max_seq_length=128, source="for the demo's small model"),
        _row_files(),
        columns=_PAIR,
        labels=_BINARY,
    )


def _chinese_tasks() -> list[Task]:
    lcqmc = Recipe(1e-4, 64, epochs=5, source="brightmart README; base and larger: 1e-5 to 2e-5, 3 epochs")
    unpublished = Recipe(2e-5, 32, epochs=3)
    ocnli = {"labels": _NLI, "skipped_labels": ("-",)}
    return [
        _clue("lcqmc", lcqmc, "question pairs, same meaning or not", labels=_BINARY, submission=None),
        _clue("afqmc", _epochs(2e-5, 16, 3), "question pairs of a bank's customers", labels=_BINARY),
        _clue("bq", unpublished, "question pairs of a bank", labels=_BINARY, submission=None),
        _clue("pawsx", unpublished, "paraphrases with high word overlap", labels=_BINARY, submission=None),
        _clue(
            "xnli",
            unpublished,
            "entailment, translated",
            labels=_NLI,
            submission=None,
            label_aliases={"contradictory": "contradiction"},
        ),
        _clue(
            "ocnli",
            unpublished,
            "entailment, original Chinese",
            **ocnli,
            files={**_row_files(), "train": ("train.json", "train.50k.json", *_row_files()["train"])},
        ),
        _clue("cmnli", _epochs(3e-5, 64, 2), "entailment, Chinese MNLI", **ocnli),
        _clue(
            "csl",
            _epochs(1e-5, 16, 5),
            "do the keywords belong to the abstract",
            labels=_BINARY,
            transform="csl",
        ),
        _clue(
            "tnews",
            _epochs(2e-5, 16, 3),
            "news headlines in 15 classes",
            columns=_SINGLE,
            labels=tuple(str(n) for n in range(100, 117) if n not in {105, 111}),
            submission=("clue", "tnews_predict.json"),
        ),
        _clue(
            "iflytek",
            _epochs(2e-5, 32, 3),
            "app descriptions in 119 classes",
            columns=_SINGLE,
            labels=tuple(str(n) for n in range(119)),
            submission=("clue", "iflytek_predict.json"),
        ),
        _clue(
            "wsc",
            _epochs(1e-5, 16, 10),
            "what a pronoun refers to",
            columns=_SINGLE,
            labels=("false", "true"),
            transform="wsc",
        ),
    ]


def _glue_tasks() -> list[Task]:
    def pair(first: str, second: str) -> Columns:
        return Columns(Column((first,)), Column((second,)), Column(_LABEL), Column(("index", "id")))

    mnli = {
        "columns": Columns(
            Column(("sentence1",)), Column(("sentence2",)), Column(("gold_label",)), Column(("index",))
        ),
        "labels": _NLI,
        "skipped_labels": ("-",),
    }
    cola_test = Columns(Column(("sentence",), 1), None, None, Column(("index",), 0))
    mrpc = Columns(
        Column(("#1 String",), 3), Column(("#2 String",), 4), Column(("Quality",), 0), Column(("index",))
    )
    mrpc_files = {
        "train": ("train.tsv", "msr_paraphrase_train.txt"),
        "dev": ("dev.tsv", "msr_paraphrase_test.txt"),
        "test": ("test.tsv", "msr_paraphrase_test.txt"),
    }
    sst = Columns(Column(("sentence",), 0), None, Column(_LABEL, 1), Column(("index",)))
    qqp = Columns(
        Column(("question1",)), Column(("question2",)), Column(("is_duplicate",)), Column(("id", "index"))
    )
    nli2 = {"labels": ("entailment", "not_entailment")}
    return [
        _glue(
            "cola",
            _google(1e-5, 16, 5336, 320),
            "grammatical or not",
            "CoLA",
            metric="matthews",
            columns=Columns(Column(("sentence",), 3), None, Column(("label",), 1), None),
            test_columns=cola_test,
        ),
        _glue(
            "sst-2",
            _google(1e-5, 32, 20935, 1256),
            "film reviews, negative or positive",
            "SST-2",
            columns=sst,
        ),
        _glue(
            "mrpc",
            _google(2e-5, 32, 800, 200),
            "news sentences, same meaning or not",
            "MRPC",
            metric="f1",
            columns=mrpc,
            files=mrpc_files,
        ),
        _glue(
            "sts-b",
            _google(2e-5, 16, 3598, 214),
            "similarity from 0 to 5 (regression)",
            "STS-B",
            kind="regression",
            metric="pearson",
            columns=pair("sentence1", "sentence2"),
            labels=None,
        ),
        _glue(
            "qqp",
            _google(5e-5, 128, 14000, 1000),
            "Quora questions, duplicates or not",
            "QQP",
            metric="f1",
            columns=qqp,
        ),
        _glue(
            "mnli",
            _google(3e-5, 128, 10000, 1000),
            "entailment (matched dev and test)",
            "MNLI-m",
            **mnli,
            files={"train": ("train.tsv",), "dev": ("dev_matched.tsv",), "test": ("test_matched.tsv",)},
        ),
        _glue(
            "mnli-mm",
            _google(3e-5, 128, 10000, 1000),
            "entailment (mismatched dev and test)",
            "MNLI-mm",
            **mnli,
            files={"train": ("train.tsv",), "dev": ("dev_mismatched.tsv",), "test": ("test_mismatched.tsv",)},
        ),
        _glue(
            "qnli",
            _google(1e-5, 32, 33112, 1986),
            "does the sentence answer the question",
            "QNLI",
            columns=pair("question", "sentence"),
            **nli2,
        ),
        _glue(
            "rte",
            _google(3e-5, 32, 800, 200),
            "entailment, small",
            "RTE",
            columns=pair("sentence1", "sentence2"),
            **nli2,
        ),
        _glue(
            "wnli",
            Recipe(1e-5, 16, epochs=3),
            "pronouns, tiny and adversarial",
            "WNLI",
            columns=pair("sentence1", "sentence2"),
        ),
    ]


def _reading_tasks() -> list[Task]:
    google = Recipe(5e-5, 48, epochs=2, max_seq_length=384, source="google README, SQuAD")
    english: dict[str, int | float | str | bool] = {
        "doc_stride": 128,
        "max_query_length": 64,
        "max_answer_length": 30,
        "n_best": 20,
        "language": "en",
    }
    cmrc = _epochs(3e-5, 32, 2, 512, "CLUE README")
    race = Recipe(1e-5, 32, steps=12000, warmup_steps=1000, max_seq_length=512, source="google README, RACE")
    squad1 = {"train": ("train-v1.1.json",), "dev": ("dev-v1.1.json",), "test": ("test.json",)}
    squad2 = {"train": ("train-v2.0.json",), "dev": ("dev-v2.0.json",), "test": ("test.json",)}
    cmrc_files = {
        "train": ("cmrc2018_train.json", "train.json"),
        "dev": ("cmrc2018_dev.json", "dev.json"),
        "test": ("cmrc2018_trial.json", "cmrc2018_test_2k.json", "test.json"),
    }
    ner_files = {
        split: (f"{split}.txt", f"{split}.conll", f"{split}.bio") for split in ("train", "dev", "test")
    }
    return [
        Task(
            "squad",
            "span",
            "answers in English Wikipedia, SQuAD 1.1",
            "f1",
            google,
            squad1,
            form="squad",
            options={**english, "null_answers": False},
        ),
        Task(
            "squad2",
            "span",
            "the same with unanswerable questions, SQuAD 2.0",
            "f1",
            google,
            squad2,
            form="squad",
            options={**english, "null_answers": True},
        ),
        Task(
            "cmrc2018",
            "span",
            "answers in Chinese Wikipedia",
            "exact_match",
            cmrc,
            cmrc_files,
            form="squad",
            options={**english, "language": "zh", "max_answer_length": 512, "null_answers": False},
        ),
        Task(
            "race",
            "choice",
            "English exams, four options",
            "accuracy",
            race,
            {split: (split, f"{split}.jsonl") for split in ("train", "dev", "test")},
            form="race",
            options={"max_query_length": 128},
        ),
        Task(
            "c3",
            "choice",
            "Chinese exams, two to four options",
            "accuracy",
            _epochs(2e-5, 24, 8, 512, "CLUE README"),
            {s: (f"{s}.json", f"m-{s}.json", f"d-{s}.json") for s in ("train", "dev", "test")},
            form="c3",
            options={"max_query_length": 128},
        ),
        Task(
            "msra-ner",
            "tagging",
            "Chinese names (BIO lines)",
            "entity_f1",
            Recipe(3e-5, 32, epochs=3),
            ner_files,
            form="conll",
        ),
        Task(
            "conll-ner",
            "tagging",
            "English names (BIO lines)",
            "entity_f1",
            Recipe(3e-5, 32, epochs=3),
            ner_files,
            form="conll",
        ),
    ]


TASKS: dict[str, Task] = {
    task.name: task for task in (_demo_task(), *_chinese_tasks(), *_glue_tasks(), *_reading_tasks())
}


def find_task(name: str) -> Task:
    """A task of the table.

    Raises:
        ConfigError: no such task; lists those there are.
    """
    if name not in TASKS:
        raise ConfigError(
            f"--task '{name}' is not known; tasks are {', '.join(TASKS)}, "
            "or custom with --task-file FILE.yaml for a task of your own"
        )
    return TASKS[name]
