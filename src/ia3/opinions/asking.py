"""Heads answer rows: `HeadJob`, `head_jobs`, `heads_say`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ia3.adapter.rows import BASE
from ia3.opinions.head import Head
from ia3.opinions.opinions import HEAD, WORDS, Opinions
from ia3.opinions.sentences import Sentences, sentence_of
from ia3.opinions.words import Words
from ia3.scoring.question import Question
from ia3.scoring.scorer import Scorer
from ia3.task.wording import Wording


@dataclass(frozen=True)
class HeadJob:
    """A row for a head.

    Attributes:
        head: answers.
        question: the row's; the head reads what the frozen model's layers hold of it.
        encoder: the sentence encoder whose embedding of `sentence` the head reads instead, or `WORDS` for its words; None: the
            model.
        sentence: see `encoder`.
    """

    head: Head
    question: Question
    encoder: str | None = None
    sentence: str = ""

    @property
    def read(self) -> tuple[Any, ...]:
        """What is read: the same for all heads that read the same."""
        return (self.question.read, *self.question.prompt) if self.encoder is None else (self.encoder, self.sentence)


def head_jobs(opinions: Opinions, wording: Wording, question: Question) -> dict[str, HeadJob]:
    """Opinion → what its head is asked about a row."""
    return {
        name: HeadJob(head, question)
        if name == HEAD
        else HeadJob(head, question, WORDS if name == WORDS else opinions.encoder, sentence_of(wording))
        for name, head in opinions.heads.items()
    }


def heads_read(jobs: Iterable[HeadJob]) -> list[Question]:
    """What `heads_say` has the frozen model read for these jobs."""
    different = {job.read: job.question for job in jobs if job.encoder is None}
    return [replace(question, adapter=BASE) for question in different.values()]


def heads_say(
    scorer: Scorer, jobs: Sequence[HeadJob], on_progress: Callable[[list[int]], Any] | None = None
) -> list[dict[str, float]]:
    """For each job what its head says (`Head.said`). What several heads read is read once.

    Args:
        scorer: of the model, whose adapters do not act.
        jobs: N of them.
        on_progress: called with the indices of the jobs that are done.
    """
    found: list[dict[str, float]] = [{}] * len(jobs)
    readers: dict[str | None, dict[tuple[Any, ...], list[int]]] = {}
    for index, job in enumerate(jobs):
        readers.setdefault(job.encoder, {}).setdefault(job.read, []).append(index)
    for encoder, same in readers.items():
        groups = list(same.values())
        some = [jobs[indices[0]] for indices in groups]

        def told(done: list[int], groups: Sequence[list[int]] = groups) -> None:
            if on_progress is not None:
                on_progress([index for group in done for index in groups[group]])

        if encoder is None:
            states = scorer.states([job.question for job in some], told).numpy()
        else:
            reader = Words() if encoder == WORDS else Sentences(encoder)
            states = reader.embeddings([job.sentence for job in some], told)
        for indices, row in zip(groups, states, strict=True):
            for index in indices:
                found[index] = jobs[index].head.said(row)
    return found
