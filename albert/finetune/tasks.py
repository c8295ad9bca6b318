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


def _two_tests(files: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """With the test sets of CLUE 1.1 and 1.0, of which the newer one is taken."""
    return {**files, "test": ("test1.1.json", *files["test"], "test1.0.json")}


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


_DEMO_RECIPE = Recipe(5e-4, 32, epochs=2, max_seq_length=128, source="for the demo's small model")
_LCQMC_RECIPE = Recipe(
    1e-4, 64, epochs=5, source="brightmart README; base and larger: 1e-5 to 2e-5, 3 epochs"
)
_UNPUBLISHED = Recipe(2e-5, 32, epochs=3)
_OCNLI: dict[str, object] = {
    "files": {**_row_files(), "train": ("train.json", "train.50k.json", *_row_files()["train"])},
    "submission": ("clue", "ocnli_50k_predict.json"),
}
_TNEWS_LABELS = tuple(str(n) for n in range(100, 117) if n not in {105, 111})
_IFLYTEK_LABELS = tuple(str(n) for n in range(119))
_NO_UPLOAD: dict[str, object] = {"submission": None}
_AGREED_NLI: dict[str, object] = {"labels": _NLI, "skipped_labels": ("-",)}
_XNLI_ALIASES = {"contradictory": "contradiction"}

# fmt: off
_CHINESE = (
    Task("demo", "classification", "the demo's sentence pairs, in their order or not", "accuracy", _DEMO_RECIPE,
         _row_files(), columns=_PAIR, labels=_BINARY),
    _clue("lcqmc", _LCQMC_RECIPE, "question pairs, same meaning or not", labels=_BINARY, **_NO_UPLOAD),
    _clue("afqmc", _epochs(2e-5, 16, 3), "question pairs of a bank's customers", labels=_BINARY),
    _clue("bq", _UNPUBLISHED, "question pairs of a bank", labels=_BINARY, **_NO_UPLOAD),
    _clue("pawsx", _UNPUBLISHED, "paraphrases with high word overlap", labels=_BINARY, **_NO_UPLOAD),
    _clue("xnli", _UNPUBLISHED, "entailment, translated", labels=_NLI, label_aliases=_XNLI_ALIASES, **_NO_UPLOAD),
    _clue("ocnli", _UNPUBLISHED, "entailment, original Chinese", **_OCNLI, **_AGREED_NLI),
    _clue("cmnli", _epochs(3e-5, 64, 2), "entailment, Chinese MNLI", **_AGREED_NLI),
    _clue("csl", _epochs(1e-5, 16, 5), "do the keywords belong to the abstract", labels=_BINARY, transform="csl"),
    _clue("tnews", _epochs(2e-5, 16, 3), "news headlines in 15 classes", columns=_SINGLE, labels=_TNEWS_LABELS,
          files=_two_tests(_row_files()), submission=("clue", "tnews*_predict.json")),
    _clue("iflytek", _epochs(2e-5, 32, 3), "app descriptions in 119 classes", columns=_SINGLE,
          labels=_IFLYTEK_LABELS),
    _clue("wsc", _epochs(1e-5, 16, 10), "what a pronoun refers to", columns=_SINGLE, labels=("false", "true"),
          transform="wsc", files=_two_tests(_row_files()), submission=("clue", "cluewsc*_predict.json")),
)
# fmt: on


def _pair(first: str, second: str, label: str | tuple[str, ...] = _LABEL) -> Columns:
    labels = (label,) if isinstance(label, str) else label
    return Columns(Column((first,)), Column((second,)), Column(labels), Column(("index", "id")))


_COLA = Columns(Column(("sentence",), 3), None, Column(("label",), 1), None)
_COLA_TEST = Columns(Column(("sentence",), 1), None, None, Column(("index",), 0))
_SST = Columns(Column(("sentence",), 0), None, Column(_LABEL, 1), Column(("index",)))
_MRPC = Columns(
    Column(("#1 String",), 3), Column(("#2 String",), 4), Column(("Quality",), 0), Column(("index",))
)
_MRPC_FILES = {
    "train": ("train.tsv", "msr_paraphrase_train.txt"),
    "dev": ("dev.tsv", "msr_paraphrase_test.txt"),
    "test": ("test.tsv", "msr_paraphrase_test.txt"),
}
_MNLI: dict[str, object] = {"columns": _pair("sentence1", "sentence2", "gold_label"), **_AGREED_NLI}
_ENTAILED = ("entailment", "not_entailment")


def _mnli_files(half: str) -> dict[str, tuple[str, ...]]:
    return {"train": ("train.tsv",), "dev": (f"dev_{half}.tsv",), "test": (f"test_{half}.tsv",)}


# fmt: off
_ENGLISH = (
    _glue("cola", _google(1e-5, 16, 5336, 320), "grammatical or not", "CoLA", metric="matthews", columns=_COLA,
          test_columns=_COLA_TEST),
    _glue("sst-2", _google(1e-5, 32, 20935, 1256), "film reviews, negative or positive", "SST-2", columns=_SST),
    _glue("mrpc", _google(2e-5, 32, 800, 200), "news sentences, same meaning or not", "MRPC", metric="f1",
          columns=_MRPC, files=_MRPC_FILES),
    _glue("sts-b", _google(2e-5, 16, 3598, 214), "similarity from 0 to 5 (regression)", "STS-B", kind="regression",
          metric="pearson", columns=_pair("sentence1", "sentence2"), labels=None),
    _glue("qqp", _google(5e-5, 128, 14000, 1000), "Quora questions, duplicates or not", "QQP", metric="f1",
          columns=_pair("question1", "question2", "is_duplicate")),
    _glue("mnli", _google(3e-5, 128, 10000, 1000), "entailment (matched dev and test)", "MNLI-m",
          files=_mnli_files("matched"), **_MNLI),
    _glue("mnli-mm", _google(3e-5, 128, 10000, 1000), "entailment (mismatched dev and test)", "MNLI-mm",
          files=_mnli_files("mismatched"), **_MNLI),
    _glue("qnli", _google(1e-5, 32, 33112, 1986), "does the sentence answer the question", "QNLI",
          columns=_pair("question", "sentence"), labels=_ENTAILED),
    _glue("rte", _google(3e-5, 32, 800, 200), "entailment, small", "RTE", columns=_pair("sentence1", "sentence2"),
          labels=_ENTAILED),
    _glue("wnli", Recipe(1e-5, 16, epochs=3), "pronouns, tiny and adversarial", "WNLI",
          columns=_pair("sentence1", "sentence2")),
)
# fmt: on

_SQUAD_RECIPE = Recipe(5e-5, 48, epochs=2, max_seq_length=384, source="google README, SQuAD")
_CMRC_RECIPE = _epochs(3e-5, 32, 2, 512, "CLUE README")
_RACE_RECIPE = Recipe(
    1e-5, 32, steps=12000, warmup_steps=1000, max_seq_length=512, source="google README, RACE"
)
_C3_RECIPE = _epochs(2e-5, 24, 8, 512, "CLUE README")
_NER_RECIPE = Recipe(3e-5, 32, epochs=3)
_SPAN: dict[str, int | float | str | bool] = {
    "doc_stride": 128,
    "max_query_length": 64,
    "max_answer_length": 30,
    "language": "en",
    "null_answers": False,
}
_SPAN_ZH: dict[str, int | float | str | bool] = {**_SPAN, "language": "zh", "max_answer_length": 512}
_CMRC_FILES = {
    "train": ("cmrc2018_train.json", "train.json"),
    "dev": ("cmrc2018_dev.json", "dev.json"),
    "test": ("cmrc2018_trial.json", "cmrc2018_test_2k.json", "test.json"),
}


def _files(*names: str) -> dict[str, tuple[str, ...]]:
    """Accepted names with the split for each `*`."""
    return {split: tuple(name.replace("*", split) for name in names) for split in ("train", "dev", "test")}


def _squad_files(version: str) -> dict[str, tuple[str, ...]]:
    return {"train": (f"train-{version}.json",), "dev": (f"dev-{version}.json",), "test": ("test.json",)}


# fmt: off
_READING = (
    Task("squad", "span", "answers in English Wikipedia, SQuAD 1.1", "f1", _SQUAD_RECIPE, _squad_files("v1.1"),
         form="squad", options=_SPAN),
    Task("squad2", "span", "the same with unanswerable questions, SQuAD 2.0", "f1", _SQUAD_RECIPE,
         _squad_files("v2.0"), form="squad", options={**_SPAN, "null_answers": True}),
    Task("cmrc2018", "span", "answers in Chinese Wikipedia", "exact_match", _CMRC_RECIPE, _CMRC_FILES, form="squad",
         options=_SPAN_ZH),
    Task("race", "choice", "English exams, four options", "accuracy", _RACE_RECIPE, _files("*", "*.jsonl"),
         form="race", options={"max_query_length": 128}),
    Task("c3", "choice", "Chinese exams, two to four options", "accuracy", _C3_RECIPE,
         _two_tests(_files("*.json", "m-*.json", "d-*.json")), form="c3", options={"max_query_length": 128},
         submission=("clue", "c3*_predict.json")),
    Task("msra-ner", "tagging", "Chinese names (BIO lines)", "entity_f1", _NER_RECIPE,
         _files("*.txt", "*.conll", "*.bio"), form="conll"),
    Task("conll-ner", "tagging", "English names (BIO lines)", "entity_f1", _NER_RECIPE,
         _files("*.txt", "*.conll", "*.bio"), form="conll"),
)
# fmt: on

TASKS: dict[str, Task] = {task.name: task for task in (*_CHINESE, *_ENGLISH, *_READING)}


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
