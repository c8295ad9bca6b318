"""What a data file holds, one dataclass per kind of task. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextExample:
    """One text or a pair of texts with a class or a number."""

    guid: str
    text_a: str
    text_b: str | None
    label: str | None
    """As it is written in the file; None where the file has no labels."""

    @property
    def is_labelled(self) -> bool:
        """Whether the answer is known."""
        return self.label is not None


@dataclass(frozen=True)
class SpanExample:
    """A question and the context that may hold its answer."""

    guid: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    """(text, first character in the context); empty where the question has no answer or is unlabelled."""
    is_impossible: bool = False
    is_labelled: bool = True


@dataclass(frozen=True)
class ChoiceExample:
    """A context, a question and its options."""

    guid: str
    context: str
    question: str
    options: tuple[str, ...]
    label: int | None
    """Index of the right option."""

    @property
    def is_labelled(self) -> bool:
        """Whether the answer is known."""
        return self.label is not None


@dataclass(frozen=True)
class TagExample:
    """Words with one tag each, in the BIO scheme."""

    guid: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None

    @property
    def is_labelled(self) -> bool:
        """Whether the answer is known."""
        return self.tags is not None


Example = TextExample | SpanExample | ChoiceExample | TagExample
