"""Hostile text: no crash, no document unaccounted for, memory bounded, and a dataset that verifies.

With --slow it is 100,000 documents, a line of 50 MB, and 100,000 documents of one character.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from albert.manifest import read_manifest
from data_prep.audit import audit_dataset
from data_prep.verify import verify_dataset
from tests.corpora import english_tokenizer, wordpiece_vocabulary
from tests.hostile import write_hostile

MAX_RESIDENT_KIB = 512 << 10
# getrusage would count the memory that this process had when it forked; the high-water mark in /proc does not.
RUN_AND_TELL_MEMORY = """
import atexit, pathlib, sys
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print(status.read_text().partition("VmHWM:")[2].split()[0]))
from data_prep.cli import main
main()
"""


@pytest.fixture(scope="module")
def amount(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    """Hostile documents, bytes of the longest line, documents of one character."""
    is_slow = request.config.getoption("--slow")
    return (100_000, 50_000_000, 100_000) if is_slow else (1000, 3_000_000, 3000)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, amount: tuple[int, int, int]) -> Path:
    directory = tmp_path_factory.mktemp("hostile")
    english_tokenizer(directory)
    wordpiece_vocabulary(directory / "vocab.txt")
    write_hostile(directory / "hostile.txt", *amount)
    return directory


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("text_format", "tokenizer", "options"),
    [
        ("lines", "tokenizer", []),
        ("prose", "tokenizer", ["--dedup", "near", "--pack-short-documents", "--dupe-factor", "2"]),
        ("jsonl", "tokenizer", []),
        ("lines", "vocab.txt", ["--pairs", "albert_pytorch", "--min-document-tokens", "1"]),
        ("prose", "vocab.txt", ["--pairs", "google", "--whole-words", "none", "--max-ngram", "5"]),
    ],
)
def test_hostile_documents_are_all_accounted_for(place, amount, tmp_path, text_format, tokenizer, options):
    command = [sys.executable, "-c", RUN_AND_TELL_MEMORY, "build", "--input", str(place / "hostile.txt")]
    command += ["--tokenizer", str(place / tokenizer), "--output", str(tmp_path / "out"), "--workers", "1"]
    result = subprocess.run(
        [*command, "--format", text_format, "--max-seq-length", "128", *options],
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    assert 0 < int(result.stdout.split()[-1]) < MAX_RESIDENT_KIB
    verify_dataset(tmp_path / "out")
    totals = read_manifest(tmp_path / "out").totals
    rejected = sum(value for key, value in totals.items() if key.startswith("rejected."))
    assert totals["documents_in"] == totals["train.documents"] + totals.get("eval.documents", 0) + rejected
    documents, _, one_character = amount
    assert totals["documents_in"] > (
        documents if text_format == "jsonl" else 0.9 * (documents + one_character)
    )
    audit = audit_dataset(tmp_path / "out", max_blocks=10_000)
    assert (audit.special_masked, audit.over_budget, audit.copied_pairs) == (0, 0, 0)
    special = [i for i in audit.tokenizer.special_ids() if i != audit.tokenizer.unk_id]
    assert audit.labels[special].sum() == 0
