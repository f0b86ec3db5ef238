"""What answers requests: the `Engine` protocol, and the work it gets. Nothing here needs torch.

The HTTP side (`app`, `store`) knows names of adapters, tasks and limits; an engine knows keys, tokens and vectors.

Threads: every `async` method of an engine is called on the server's one event loop, and must not block it; the plain
methods say where they are called. When the task that awaits a method is cancelled (the client has left, or the
request's deadline has passed), work that has not begun must be dropped, and generation must stop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ia3.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.scoring.question import Question
    from ia3.task.wording import Wording
    from ia3.training.recipe import Recipe


class AdapterFailed(InputError):
    """One job cannot be done because of its adapter: its files are gone, damaged, or not for this model."""


@dataclass(frozen=True)
class ScoreJob:
    """A question whose answer choices are to be scored.

    Attributes:
        adapter: the key of the adapter that answers, as given to `Engine.add`; None: the base model.
        question: prompt and choices as token ids, of `Engine.questions`.
        length_normalization: the power of a choice's token count that its log-probability is divided by.
    """

    adapter: str | None
    question: Question
    length_normalization: float = 1.0


@dataclass(frozen=True)
class GenerateJob:
    """A text to be continued.

    Attributes:
        adapter: as of `ScoreJob`.
        prompt: token ids, one at least; with `max_tokens` within the engine's context length.
        max_tokens: how many tokens to generate at most, 1 at least.
        temperature: of sampling; 0: the most probable token; else large enough to divide by.
        top_p: sample among the most probable tokens whose probabilities reach this sum, above 0; 1: among all.
        stop: texts that end the generation; the text ends before them.
        seed: makes sampling repeatable; None: it is not.
    """

    adapter: str | None
    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Piece:
    """The next piece of a generated text.

    Attributes:
        text: it may be empty; nothing that belongs to a stop text, and no half characters.
        tokens: how many have been generated up to here.
        finish: on the last piece, "stop" (the model or a stop text ended it) or "length".
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"] | None = None


def normalized(log_probability: float, tokens: int, power: float) -> float:
    """Σ_t log p(y_t | x, y_<t) / T^power, as `Scorer.score` has it: 0 where T^power is more than a float can be."""
    return log_probability * tokens**-power


class Engine(Protocol):
    """A base model and adapters by key.

    A key stands for one content for ever: when an adapter's files change, the server adds them under a new key, sends new
    requests there, and drops the old key when the last request that uses it has ended.

    Attributes:
        name: the base model's, for `/v1/models`.
        tokenizer: the base model's (transformers), once `start` is done. Used on one thread other than the event loop's.
        context_length: how many tokens prompt and continuation may have together; None: no limit is known.
        generates: whether the model continues texts; False for encoders and encoder-decoders.
        observe: set by the server before `start`: may be called, on any thread, with what a batch did ("score",
            "prefill", "decode", or "step" for what mixes these), its rows, and how many different adapters they have.
        on_end: set by the server before `start`: called, on the event loop, with the error by which an engine that had
            started has ended. It answers nothing any more, and has let fail what waited.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    context_length: int | None
    generates: bool
    observe: Callable[[str, int, int], None]
    on_end: Callable[[BaseException], None]

    async def start(self) -> None:
        """Load the model: it may take minutes. Called once, before all others. Raises `InputError`."""

    async def stop(self) -> None:
        """Let go of the model. Called once, when no job is left; perhaps while `start` is under way."""

    def questions(self, wordings: Sequence[Wording], recipe: Recipe) -> list[Question]:
        """Rows in words as questions that fit the model. Blocks: called on a thread of its own.

        Raises:
            InputError: a row cannot be used.
        """
        ...

    async def score(self, jobs: Sequence[ScoreJob]) -> list[list[float]]:
        """For each job Σ_t log p(y_t | x, y_<t) / T^power of each choice, in the order in which the caller listed them (see
        `Question.as_listed`).

        Jobs of different calls and different adapters share batches, and jobs about one text may share its reading.

        Raises:
            AdapterFailed: a job's adapter cannot be used.
            InputError: scores that are not numbers.
        """
        ...

    def generate(self, job: GenerateJob) -> AsyncIterator[Piece]:
        """The continuation, piece by piece; the last piece, and no other, has a `finish`. Errors: see `score`.

        An asynchronous generator: called and iterated on the event loop. Closing it stops the generation.
        """
        ...

    async def add(self, key: str, folder: str, check: bool) -> None:
        """Make an adapter known under a new key.

        Args:
            key: letters, digits and `._-/@`.
            folder: with adapter_config.json and adapter_model.safetensors.
            check: read all of it now; False: what says whether it fits, and its numbers when it is first asked for.

        Raises:
            InputError: it is no adapter, or does not fit the model.
        """

    async def keep(self, keys: Sequence[str], change: Callable[[], None]) -> None:
        """Call what takes a folder away, so that the adapters whose folder it is go on until they are dropped.

        Args:
            keys: of all adapters in that folder. Those that cannot be read are lost.
            change: quick; called on any thread. What it raises is raised.
        """

    async def drop(self, key: str) -> None:
        """Forget an adapter that no job uses any more."""

    def statistics(self) -> dict[str, Any]:
        """Numbers for `/metrics`, any of `resident`, `hits`, `misses`, `evictions`. Called on the event loop."""
        ...
