"""What the command line asks for, apart from the numbers of the training. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """Files, directories and what to do with them."""

    task: str
    data_dir: str
    model: str
    output: str
    do_train: bool = False
    do_eval: bool = False
    do_test: bool = False
    do_predict: bool = False
    tokenizer: str | None = None
    task_file: str | None = None
    skip_bad_rows: bool = False
    num_seeds: int = 1
    learning_rates: tuple[float, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings that the command line gave, by their name in `FinetuneSettings`."""

    @property
    def is_sweep(self) -> bool:
        """Whether more than one training was asked for."""
        return self.num_seeds > 1 or bool(self.learning_rates)

    def splits(self) -> list[str]:
        """Splits that must be there, train first because it defines the labels."""
        return [
            *(["train"] if self.do_train else []),
            *(["dev"] if self.do_eval else []),
            *(["test"] if self.do_test or self.do_predict else []),
        ]
