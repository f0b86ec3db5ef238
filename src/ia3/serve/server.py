"""The shared code of the routes: `Server`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

from ia3.errors import InputError, about, reason
from ia3.opinions.asking import head_jobs
from ia3.opinions.opinions import VECTORS, Opinions
from ia3.scoring.fitting import most_characters
from ia3.serve.adapter import Adapter, Settings
from ia3.serve.engine import AdapterFailed, Engine, GenerateJob, Piece, ScoreJob
from ia3.serve.gate import described, unexpected
from ia3.serve.limits import CLIENT_GONE, Limits, Problem, Queue, left
from ia3.serve.metrics import Metrics
from ia3.serve.projects import Projects, UnknownProject
from ia3.serve.schemas import ChatBody, ClassifyBody, CompletionBody
from ia3.serve.store import Conflict, NotStored, Store, UnknownAdapter, UnusableAdapter
from ia3.serve.worker import Worker
from ia3.task.rows import as_rows
from ia3.task.sandbox import MOST_CHARACTERS, TooLong, bounded

if TYPE_CHECKING:
    from ia3.task.task import Row, Task

logger = logging.getLogger(__name__)

OPENAI = ("/v1/completions", "/v1/chat/completions")

# A lower temperature takes the most probable token, as in other servers.
_LEAST_TEMPERATURE, _LEAST_TOP_P = 1e-5, 1e-9

# The maximum of characters of an error message, which may repeat the client's input.
_MOST_SAID = 1000

# The number of characters that are rendered and tokenized in one turn.
_TOGETHER = 20_000

_Result = TypeVar("_Result")


class _Row(NamedTuple):
    """A row that is classified.

    Attributes:
        jobs: opinion, and what the engine is asked; the vectors are asked once in each wording.
        labels: of the choices, in each wording.
        opinions: how their answers are put together.
        temperature: divides the scores.
        task: says what the labels are.
    """

    jobs: list[tuple[str, ScoreJob]]
    labels: list[list[str]]
    opinions: Opinions
    temperature: float
    task: Task

    def together(self, answers: Sequence[list[float]]) -> dict[str, float]:
        """The scores of the labels, of the answers to the jobs."""
        vectors, heads = [dict.fromkeys(labels, 0.0) for labels in self.labels], {}
        for place, ((name, _), values) in enumerate(zip(self.jobs, answers, strict=True)):
            if name == VECTORS:
                vectors[place] = dict(zip(self.labels[place], values, strict=True))
            else:
                heads[name] = dict(zip(self.opinions.heads[name].labels, values, strict=True))
        return self.opinions.together(vectors, heads, self.temperature)


class Server:
    """The state and the work that routes share.

    Args:
        engine: runs the model.
        store: the adapters.
        limits: the limits of requests.
        token: the token that clients must send; None: none.
        hosts: see `Gate`.
        log_texts: log the texts that clients send.
        refresh: seconds between looks at the adapters' folder or address; None: only when `reload` is called.

    Attributes:
        metrics: the metrics.
        on_failure: called if the model cannot be loaded or its engine has ended, so nothing can be served.
        worker: renders and tokenizes.
        projects: what is labelled and trained here.
        ready: the model is loaded and runs, and the server is not shutting down.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        limits: Limits | None = None,
        token: str | None = None,
        hosts: set[str] | None = None,
        log_texts: bool = False,
        refresh: float | None = None,
    ) -> None:
        self.engine, self.store, self.limits = engine, store, limits or Limits()
        self.token, self.hosts, self.log_texts = token, hosts or set(), log_texts
        self.queue, self.uploads = Queue(self.limits.queue), Queue(self.limits.uploads, "uploads")
        self.metrics = Metrics(
            lambda: {
                "queue": self.queue.length,
                "adapters": len(store),
                **(engine.statistics() if self.started else {}),
            }
        )
        engine.observe, engine.on_end = self.metrics.batch, self.fail
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        self.started = self.closing = self.failed = False
        self._refresh = refresh
        self._following: asyncio.Future[None] | None = None
        self.projects = Projects(store, engine)
        self.worker = Worker(lambda check: bounded(self._most_characters(), check))

    @property
    def ready(self) -> bool:
        return self.started and not self.closing and not self.failed

    def fail(self, error: BaseException) -> None:
        """Record that the model failed to load or its engine has ended."""
        self.failed = True
        if not isinstance(error, InputError):
            logger.error("the engine has failed", exc_info=error)
        self.on_failure(error)

    async def start(self) -> None:
        """Load the model, then serve the store's adapters."""
        await self.engine.start()
        await self.store.open(self.engine)
        self.started = True
        if self._refresh is not None:
            self._following = asyncio.ensure_future(self._follow(self._refresh))

    async def _follow(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self.reload(if_changed=True)

    async def reload(self, if_changed: bool = False) -> None:
        """Look at the adapters again, as `Store.reload` does. The log has the result; after an error, serving goes on as
        before."""
        if not self.started:
            return
        try:
            found = await self.store.reload(if_changed)
        except (InputError, OSError) as error:
            logger.error("reload failed", extra={"fields": {"reason": reason(error)}})
        except Exception:
            logger.exception("reload failed")
        else:
            if found is not None and (any(found.values()) or not if_changed):
                logger.info("reload", extra={"fields": {key: len(names) for key, names in found.items()}})

    async def stop(self) -> None:
        """Stop all that runs. Call it when no request is left."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self.projects.stop()
        self.worker.stop()
        await self.engine.stop()

    def require_started(self) -> None:
        """Raise `Problem` (503) unless the model is loaded."""
        if not self.started:
            raise Problem(503, "The model is still being loaded; try again soon.", "not_ready", {"Retry-After": "2"})

    async def blocking(self, function: Callable[..., _Result], *args: Any, characters: int = 0) -> _Result:
        """Call a function that renders or tokenizes `characters` on the worker's thread."""
        return await self.worker.call(characters, function, *args)

    def _most_characters(self) -> int | None:
        """The server's limit of characters per prompt; longer prompts are refused. None: no limit, and the recipe
        decides what to do about prompts that are longer than the context."""
        if self.limits.text_characters is not None:
            return self.limits.text_characters
        return None if self.limits.text_tokens is None else most_characters(self.limits.text_tokens)

    async def settle(self, request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of a coroutine. It is cancelled at the request's deadline or when the client disconnects."""

        async def leaving() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
        try:
            timeout = left(request.scope["deadline"])
            await asyncio.wait({task, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise Problem(CLIENT_GONE, "The client has left.")
            raise self.late()
        finally:
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    def late(self) -> Problem:
        """The `Problem` for a passed deadline."""
        return Problem(504, f"There was no answer within {self.limits.deadline:g} seconds.", "deadline")

    def adapter(self, name: str) -> Adapter | None:
        """The adapter in a `model` field; None: the base model. Raises `UnknownAdapter`."""
        if name == self.engine.name:
            return None
        try:
            return self.store.get(name)
        except UnknownAdapter:
            close = self.store.close_to(name, self.engine.name)
            raise UnknownAdapter(f"There is no model {name[:100]!r}; {close}.") from None

    async def require_continuing(self, adapter: Adapter | None) -> None:
        """Raises `InputError` for an adapter that acts on what is asked about a text alone."""
        place = "start"
        with contextlib.suppress(InputError, OSError, RecursionError):  # the engine says what is wrong with its files
            place = place if adapter is None else await asyncio.to_thread(adapter.acts_from)
        if adapter is not None and place == "question":
            raise InputError(
                f"Adapter {adapter.name!r} answers questions behind a text (acts_from: question) and continues no texts; use "
                f"/v1/classify, or train it with --acts-from start."
            )

    def check_tokens(self, tokens: int) -> None:
        """Raise `TooLong` if a prompt has too many tokens."""
        most = self.limits.text_tokens
        if most is not None and tokens > most:
            raise TooLong(f"Expected prompts of at most {most} tokens, found {tokens}.")

    # Classification.

    def asked(self, body: ClassifyBody) -> list[Adapter]:
        """The adapters that a body names, each once.

        Raises:
            UnknownAdapter: one is not served, or none is there for "*".
            UnusableAdapter: one cannot be used.
            Problem: they are more questions than may wait.
        """
        if body.adapter is not None:
            return [self.store.get(body.adapter)]
        names = self.store.names if body.adapters == "*" else list(dict.fromkeys(body.adapters or []))
        if not names:
            raise UnknownAdapter("There are no adapters here yet.")
        if len(names) * len(body.items) > self.limits.queue:
            raise Problem(
                422,
                f"Expected at most {self.limits.queue} questions (texts × adapters), found {len(body.items)} × {len(names)}.",
                "too_many",
            )
        return [self.store.get(name) for name in names]

    async def classify(self, body: ClassifyBody, adapters: Sequence[Adapter]) -> dict[str, Any]:
        """The response to `/v1/classify`: each adapter's prediction for each text, in its own task."""
        several = body.adapters is not None
        settings = await asyncio.to_thread(lambda: [adapter.settings() for adapter in adapters])
        asked: list[_Row] = []
        for adapter, its in zip(adapters, settings, strict=True):
            owner = f"Adapter {adapter.name!r}" if several else None
            rows = _rows(body, its.task, adapter.name, owner)
            # Texts of other requests have their turns in between.
            for indices, characters in _groups(rows):
                key = None if body.without_adapter else adapter.key
                asked += await self.blocking(self._asked, its, rows, indices, key, owner, characters=characters)
        scores = await self.engine.score([job for row in asked for _, job in row.jobs])
        return await asyncio.to_thread(self._predictions, body, adapters, asked, scores)

    def _asked(
        self, settings: Settings, rows: Sequence[Row], indices: Sequence[int], key: str | None, owner: str | None
    ) -> list[_Row]:
        """Some rows with their jobs; the base model (without a key) answers by itself."""
        task, recipe = settings.task, settings.recipe
        assert task is not None  # otherwise there are no rows
        opinions, temperature = (Opinions(), 1.0) if key is None else (settings.opinions, settings.temperature)
        with about(owner):
            places = opinions.asking(len(task.templates))
            wordings = [task.wording(rows[index], index + 1, place) for index in indices for place in places]
            questions = self.engine.questions(wordings, recipe)
            labels = [list(wording.answers) for wording in wordings]
            for question in questions:
                with about(row=question.row):
                    self.check_tokens(len(question.prompt))
        found = []
        for first in range(0, len(questions), len(places)):
            its = slice(first, first + len(places))
            power, question = recipe.length_normalization, questions[first]
            jobs = [(VECTORS, ScoreJob(key, one, power)) for one in questions[its]] if opinions.vectors else []
            for name, head in head_jobs(opinions, wordings[first], question).items():
                jobs.append((name, ScoreJob(None, question, head=head)))
            found.append(_Row(jobs, labels[its], opinions, temperature, task))
        return found

    def _predictions(
        self,
        body: ClassifyBody,
        adapters: Sequence[Adapter],
        asked: Sequence[_Row],
        scores: Sequence[list[float]],
    ) -> dict[str, Any]:
        """The response, of what there is for each text of the first adapter, then of the next."""
        from ia3.evaluation.prediction import Prediction

        found, left = [], iter(scores)
        for row in asked:
            together = row.together([next(left) for _ in row.jobs])
            given = row.task.costs, row.opinions.thresholds
            item = Prediction.of(together, row.temperature, body.abstain_below, *given)
            grade = row.task.grade(item.probabilities)
            graded = {} if grade is None else grade._asdict()
            # The base model has no thresholds, and gives the most probable label alone.
            answer = {"labels": item.labels} if row.task.multi_label else {"label": item.label}
            found.append({**answer, "probabilities": item.probabilities, **graded})
        usage = {"prompt_tokens": sum(len(row.jobs[0][1].question.prompt) for row in asked)}
        names = [adapter.name for adapter in adapters]
        if body.adapters is None:
            [name] = names
            which = {"adapter": None if body.without_adapter else name, "task": name}
            return {**which, "predictions": found, "usage": usage}
        which = {"adapters": None if body.without_adapter else names, "tasks": names}
        count = len(body.items)
        each = [dict(zip(names, found[index::count], strict=True)) for index in range(count)]
        return {**which, "predictions": each, "usage": usage}

    # Generation.

    async def completion_prompts(self, body: CompletionBody) -> list[list[int]]:
        """The token ids of each prompt."""
        return [await self.blocking(self._tokens, prompt, characters=len(prompt)) for prompt in body.prompts]

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        from ia3.scoring.tokens import unclosed

        tokenizer = self.engine.tokenizer
        if isinstance(prompt, str):
            self._check_characters(len(prompt))
            ids = unclosed(tokenizer, list(tokenizer(prompt)["input_ids"]), prompt)  # type: ignore[arg-type]
        else:
            ids = prompt
            if max(ids) >= len(tokenizer):
                raise InputError(f"Expected token ids below {len(tokenizer)}, found {max(ids)}.")
        if not ids:
            raise InputError("Expected a prompt with at least one token, found an empty one.")
        return ids

    async def chat_prompt(self, body: ChatBody) -> list[list[int]]:
        """The token ids of a conversation, with the model's chat template."""
        characters = sum(len(message.text) for message in body.messages)
        self._check_characters(characters)
        return [await self.blocking(self._chat_tokens, body, characters=characters)]

    def _chat_tokens(self, body: ChatBody) -> list[int]:
        import jinja2

        tokenizer = self.engine.tokenizer
        if not tokenizer.chat_template:
            raise InputError(f"{self.engine.name!r} has no chat template; use completions.")
        messages = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in body.messages
        ]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise InputError(f"The model's chat template takes no such conversation: {error}") from error
        self._check_characters(len(text))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    def _check_characters(self, characters: int) -> None:
        """Raise `Problem` (422) if a prompt is too long to tokenize."""
        most, context = self._most_characters(), self.engine.context_length
        if most is None:
            most = MOST_CHARACTERS if context is None else most_characters(context)
        if characters > most:
            raise Problem(422, f"Expected prompts of at most {most} characters, found {characters}.", "too_long")

    def jobs(
        self, body: CompletionBody | ChatBody, adapter: Adapter | None, prompts: list[list[int]], wanted: int | None
    ) -> list[GenerateJob]:
        """The generation jobs. Raises `Problem` (400) if they do not fit the context."""
        context, most = self.engine.context_length, self.limits.new_tokens
        if wanted is not None and wanted > most:
            raise Problem(400, f"Expected max_tokens of at most {most}, found {wanted}.", "too_long")
        made = []
        for prompt in prompts:
            self.check_tokens(len(prompt))
            room = most if context is None else context - len(prompt)
            if room < (wanted or 1):
                raise Problem(
                    400,
                    f"This model's maximum context length is {context} tokens, but {len(prompt)} of the prompt and "
                    f"{wanted or 1} of the completion were requested.",
                    "context_length_exceeded",
                )
            made.append(
                GenerateJob(
                    adapter=None if adapter is None else adapter.key,
                    prompt=prompt,
                    max_tokens=wanted or min(most, room),
                    # Below these limits only one token is left, or numbers become NaN.
                    temperature=body.temperature if body.temperature >= _LEAST_TEMPERATURE else 0.0,
                    top_p=max(body.top_p, _LEAST_TOP_P),
                    stop=body.stops,
                    seed=body.seed,
                )
            )
        return made

    async def generate(self, jobs: Sequence[GenerateJob]) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all jobs in order of arrival, each with its job's index."""
        pieces: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()

        async def run(index: int, job: GenerateJob) -> None:
            try:
                async with contextlib.aclosing(self.engine.generate(job)) as generated:  # type: ignore[type-var]
                    before = 0
                    async for piece in generated:
                        self.metrics.generated(piece.tokens - before)
                        before = piece.tokens
                        pieces.put_nowait((index, piece))
            except Exception as error:
                pieces.put_nowait((index, error))

        tasks = [asyncio.ensure_future(run(index, job)) for index, job in enumerate(jobs)]
        running = len(tasks)
        try:
            while running:
                index, piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                running -= piece.finish is not None
                yield index, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _rows(body: ClassifyBody, task: Task | None, name: str, owner: str | None) -> list[Row]:
    """The rows in a body. Raises `InputError`."""
    if task is None:
        raise InputError(
            f"Adapter {name!r} has no labels, for it has no task.yaml, or one whose answer is text; use completions."
        )
    with about(owner):
        return as_rows(body.items, task)


def _groups(rows: Sequence[Row]) -> Iterator[tuple[list[int], int]]:
    """The row indices of each turn, and the number of characters of their texts."""
    group: list[int] = []
    characters = 0
    for index, row in enumerate(rows):
        its = sum(len(value) for value in row.values() if isinstance(value, str))
        if group and characters + its > _TOGETHER:
            yield group, characters
            group, characters = [], 0
        group.append(index)
        characters += its
    if group:
        yield group, characters


def problem_of(error: Exception, path: str) -> Problem | None:
    """The response for a client's error; None for other errors."""
    openai = path in OPENAI
    if isinstance(error, Problem):
        if error.status == 422 and openai:
            return Problem(400, error.message, error.code, error.headers)
        return error
    if isinstance(error, UnknownAdapter):
        return Problem(404, str(error), "model_not_found" if openai else "adapter_not_found")
    if isinstance(error, UnknownProject):
        return Problem(404, str(error), "project_not_found")
    if isinstance(error, Conflict):
        return Problem(409, str(error), "conflict")
    if isinstance(error, AdapterFailed):
        return Problem(500, "This adapter cannot be used; see the server's log.", "adapter_failed")
    if isinstance(error, NotStored):
        return Problem(507, str(error), "not_stored")
    if isinstance(error, UnusableAdapter):
        return Problem(400 if openai else 422, str(error), "adapter_unusable")
    if isinstance(error, InputError):
        return Problem(400 if openai else 422, str(error), "too_long" if isinstance(error, TooLong) else "invalid")
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail), None, dict(error.headers or {}))
    return None


def told(server: Server, scope: Any, error: Exception) -> Problem:
    """The response for any error. Details go to the log."""
    problem = problem_of(error, scope["path"])
    if isinstance(error, AdapterFailed):
        scope["note"]["reason"] = str(error)
    if problem is None:
        scope["note"] |= described(error)
        problem = unexpected(scope["identity"])
    problem.message = server.store.public(problem.message)[:_MOST_SAID]
    return problem
