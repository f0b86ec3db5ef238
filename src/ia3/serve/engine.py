"""The `Engine` protocol, and the jobs of an engine. Nothing here needs torch.

The HTTP side (`app`, `store`) handles names of adapters, tasks and limits; an engine handles keys, tokens and vectors.

Threads: every `async` method of an engine is called on the server's event loop, and must not block it; the other
methods document their thread. If the task that awaits a method is cancelled (the client disconnected, or the deadline
passed), the engine must drop work that has not begun, and stop generation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ia3.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.opinions.asking import HeadJob
    from ia3.scoring.question import Question
    from ia3.task.wording import Wording
    from ia3.training.recipe import Recipe


class AdapterFailed(InputError):
    """A job failed because of its adapter: its files are missing, damaged, or not for this model."""


@dataclass(frozen=True)
class ScoreJob:
    """A question with answer choices to score.

    Attributes:
        adapter: the adapter's key, as given to `Engine.add`; None: the base model.
        question: prompt and choices as token ids, from `Engine.questions`.
        length_normalization: a log-probability is divided by this power of the choice's token count.
        head: answers in place of the choices: its labels' log-probabilities.
    """

    adapter: str | None
    question: Question
    length_normalization: float = 1.0
    head: HeadJob | None = None


@dataclass(frozen=True)
class GenerateJob:
    """A prompt to continue.

    Attributes:
        adapter: see `ScoreJob`.
        prompt: at least one token id; together with `max_tokens` within the engine's context length.
        max_tokens: the maximum of tokens to generate, at least 1.
        temperature: the sampling temperature; 0: the most probable token; otherwise large enough to divide by.
        top_p: sample among the most probable tokens whose probabilities reach this sum, above 0; 1: among all.
        stop: texts that end the generation; the generated text ends before them.
        seed: makes sampling repeatable; None: sampling differs each time.
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
        text: the text, possibly empty, without parts of a stop text and without incomplete characters.
        tokens: the number of generated tokens so far.
        finish: for the last piece, "stop" (the model or a stop text ended it) or "length".
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"] | None = None


def normalized(log_probability: float, tokens: int, power: float) -> float:
    """Σ_t log p(y_t | x, y_<t) / T^power, as in `Scorer.score`; 0 if T^power overflows a float."""
    return log_probability * tokens**-power


class Engine(Protocol):
    """A base model and adapters by key.

    The content of a key never changes. If an adapter's files change, the server adds them with a new key, uses it for
    new requests, and drops the old key after its last request.

    Attributes:
        name: the base model's name, for `/v1/models`.
        dtype: the type of its weights, as `load_base` takes it.
        tokenizer: the base model's tokenizer (transformers), after `start`. It is used on one thread, not the event
            loop's.
        context_length: the maximum of tokens of prompt and continuation together; None: unknown.
        generates: whether the model continues texts; False for encoders and encoder-decoders.
        observe: set by the server before `start`. It may be called, on any thread, with the type of a batch ("score",
            "prefill", "decode", or "step" for a mixture), its rows, and its number of different adapters.
        on_end: set by the server before `start`. It is called, on the event loop, with the error that ended a started
            engine. The engine then answers nothing more, and all waiting jobs have failed.
    """

    name: str
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    context_length: int | None
    generates: bool
    observe: Callable[[str, int, int], None]
    on_end: Callable[[BaseException], None]

    @property
    def source(self) -> str | None:
        """The base model, as `load_base` takes it, for which adapters can be trained beside; None: they cannot."""
        ...

    async def start(self) -> None:
        """Load the model, which may take minutes. Called once, before all other methods. Raises `InputError`."""

    async def stop(self) -> None:
        """Release the model. Called once, when no job is left, possibly during `start`."""

    def questions(self, wordings: Sequence[Wording], recipe: Recipe) -> list[Question]:
        """The questions of wordings, which fit the model's context. Blocks, so it is called on a separate thread.

        Raises:
            InputError: a row cannot be used.
        """
        ...

    async def score(self, jobs: Sequence[ScoreJob]) -> list[list[float]]:
        """For each job, Σ_t log p(y_t | x, y_<t) / T^power of each choice, in the caller's order (see
        `Question.as_listed`); or the log-probabilities of its head's labels.

        Jobs of different calls and different adapters share batches, and jobs about one text may share its reading.

        Raises:
            AdapterFailed: a job's adapter cannot be used.
            InputError: scores are NaN, or the engine gives no hidden states for a head.
        """
        ...

    def generate(self, job: GenerateJob) -> AsyncIterator[Piece]:
        """The continuation, piece by piece; only the last piece has a `finish`. Errors: see `score`.

        This is an asynchronous generator, used on the event loop. Closing it stops the generation.
        """
        ...

    async def add(self, key: str, folder: str, check: bool) -> None:
        """Add an adapter with a new key.

        Args:
            key: letters, digits and `._-/@`.
            folder: the folder with adapter_config.json and adapter_model.safetensors.
            check: read everything now; False: check whether it fits, and read its numbers at first use.

        Raises:
            InputError: the folder has no adapter, or one that does not fit the model.
        """

    async def keep(self, keys: Sequence[str], change: Callable[[], None]) -> None:
        """Call a function that removes a folder, but keep its adapters usable until they are dropped.

        Args:
            keys: the keys of all adapters in the folder. Unreadable adapters are lost.
            change: a quick function; it is called on any thread, and its errors are raised.
        """

    async def drop(self, key: str) -> None:
        """Remove an adapter that no job uses any more."""

    def statistics(self) -> dict[str, Any]:
        """Numbers for `/metrics`: any of `resident`, `hits`, `misses`, `evictions`. Called on the event loop."""
        ...
