"""The HTTP routes: `create_app`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ia3 import __version__
from ia3.errors import InputError, problems
from ia3.serve.engine import AdapterFailed, Engine, GenerateJob, Piece, ScoreJob
from ia3.serve.gate import Gate, described, unexpected
from ia3.serve.limits import CLIENT_GONE, Limits, Problem, Queue, left
from ia3.serve.metrics import Metrics
from ia3.serve.schemas import Body, ChatBody, ClassifyBody, CompletionBody, FolderBody
from ia3.serve.store import Adapter, Conflict, NotStored, Store, UnknownAdapter

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ia3.tfew.choices import Question
    from ia3.tfew.predict import Prediction

logger = logging.getLogger(__name__)

_OPENAI = ("/v1/completions", "/v1/chat/completions")
_BODIES: dict[str, type[Body]] = {
    "/v1/classify": ClassifyBody,
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}

_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)

_Body = TypeVar("_Body", bound=Body)
_Result = TypeVar("_Result")


class Server:
    """What the routes share.

    Args:
        engine: answers.
        store: adapters.
        limits: of requests.
        token: what clients have to show; None: nothing.
        hosts: see `Gate`.
        log_texts: log what clients send.

    Attributes:
        metrics: what is counted.
        on_failure: called when the model cannot be loaded, or its engine has ended: there is nothing left to serve.
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
        self._encoder = ThreadPoolExecutor(1, "ia3-tokens")  # tokenizers are not for several threads at once

    @property
    def ready(self) -> bool:
        return self.started and not self.closing and not self.failed

    def fail(self, error: BaseException) -> None:
        """There is no model, or no more."""
        self.failed = True
        if not isinstance(error, InputError):
            logger.error("the engine has failed", exc_info=error)
        self.on_failure(error)

    async def start(self) -> None:
        """Load the model, then serve what the store has found."""
        await self.engine.start()
        await self.store.open(self.engine)
        self.started = True

    async def stop(self) -> None:
        """When no request is left."""
        self._encoder.shutdown(wait=False, cancel_futures=True)
        await self.engine.stop()

    def require_started(self) -> None:
        """Raises `Problem` (503)."""
        if not self.started:
            raise Problem(503, "The model is still being loaded; try again soon.", "not_ready", {"Retry-After": "2"})

    async def blocking(self, function: Callable[..., _Result], *args: Any) -> _Result:
        """Call what reads files or tokenizes on a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._encoder, function, *args)

    async def settle(self, request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of a coroutine, which is cancelled at the request's deadline or when its client leaves."""

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
        """A deadline that has passed."""
        return Problem(504, f"There was no answer within {self.limits.deadline:g} seconds.", "deadline")

    def adapter(self, name: str) -> Adapter | None:
        """The adapter that a `model` field names; None: the base model. Raises `UnknownAdapter`."""
        if name == self.engine.name:
            return None
        try:
            return self.store.get(name)
        except UnknownAdapter:
            close = self.store.close_to(name, self.engine.name)
            raise UnknownAdapter(f"There is no model {name[:100]!r}; {close}.") from None

    def check_tokens(self, tokens: int, what: str) -> None:
        """Raises `Problem` (422) for a prompt that is too long."""
        most = self.limits.text_tokens
        if most is not None and tokens > most:
            raise Problem(422, f"Expected {what} of at most {most} tokens, found {tokens}.", "too_long")

    # Classification.

    async def classify(self, body: ClassifyBody, adapter: Adapter) -> dict[str, Any]:
        """The response to `/v1/classify`."""
        jobs, labels, temperature = await self.blocking(self._questions, body, adapter)
        scores = await self.engine.score(jobs)
        return await self.blocking(self._predictions, body, adapter, jobs, labels, temperature, scores)

    def _questions(self, body: ClassifyBody, adapter: Adapter) -> tuple[list[ScoreJob], list[list[str]], float]:
        settings = adapter.settings()
        task, recipe = settings.task, settings.recipe
        if task is None:
            raise InputError(f"Adapter {adapter.name!r} has no task.yaml, so that it has no labels; use completions.")
        rows: list[dict[str, Any]] = list(body.rows or [])
        if body.texts is not None:
            if len(task.columns) != 1:
                raise InputError(
                    f"Expected rows with {task.columns} for adapter {adapter.name!r}, found texts: its task has not one column."
                )
            rows = [{task.columns[0]: text} for text in body.texts]
        questions: list[Question] = self.engine.questions(task, rows, recipe)
        for number, question in enumerate(questions, 1):
            self.check_tokens(len(question.prompt), f"prompts (row {number})")
        key = None if body.without_adapter else adapter.key
        temperature = 1.0 if body.without_adapter else settings.temperature
        labels = [list(task.answers(row, number)) for number, row in enumerate(rows, 1)]
        return [ScoreJob(key, question, recipe.length_normalization) for question in questions], labels, temperature

    def _predictions(
        self,
        body: ClassifyBody,
        adapter: Adapter,
        jobs: Sequence[ScoreJob],
        labels: Sequence[list[str]],
        temperature: float,
        scores: Sequence[list[float]],
    ) -> dict[str, Any]:
        from ia3.tfew.predict import Prediction

        found: list[Prediction] = []
        for job, names, values in zip(jobs, labels, scores, strict=True):
            by_label = {names[job.question.listed(i)]: value for i, value in enumerate(values)}
            listed = {name: by_label[name] for name in names}
            found.append(Prediction.of(listed, temperature, body.abstain_below))
        return {
            "adapter": None if body.without_adapter else adapter.name,
            "task": adapter.name,
            "predictions": [{"label": item.label, "probabilities": item.probabilities} for item in found],
            "usage": {"prompt_tokens": sum(len(job.question.prompt) for job in jobs)},
        }

    # Generation.

    def completion_prompts(self, body: CompletionBody) -> list[list[int]]:
        """Token ids of each prompt. Blocks."""
        from ia3.tfew.choices import unclosed

        tokenizer, found = self.engine.tokenizer, []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                ids = unclosed(tokenizer, list(tokenizer(prompt)["input_ids"]), prompt)  # type: ignore[arg-type]
            else:
                ids = prompt
                if max(ids) >= len(tokenizer):
                    raise InputError(f"Expected token ids below {len(tokenizer)}, found {max(ids)}.")
            if not ids:
                raise InputError("Expected a prompt with at least one token, found an empty one.")
            found.append(ids)
        return found

    def chat_prompt(self, body: ChatBody) -> list[list[int]]:
        """Token ids of a conversation, by the model's chat template. Blocks."""
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
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"])]  # type: ignore[arg-type]

    def jobs(
        self, body: CompletionBody | ChatBody, adapter: Adapter | None, prompts: list[list[int]], wanted: int | None
    ) -> list[GenerateJob]:
        """What to generate. Raises `Problem` (400) where it does not fit."""
        context, most = self.engine.context_length, self.limits.new_tokens
        if wanted is not None and wanted > most:
            raise Problem(400, f"Expected max_tokens of at most {most}, found {wanted}.", "too_long")
        made = []
        for prompt in prompts:
            self.check_tokens(len(prompt), "prompts")
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
                    temperature=body.temperature,
                    top_p=body.top_p,
                    stop=body.stops,
                    seed=body.seed,
                )
            )
        return made

    async def generate(self, jobs: Sequence[GenerateJob]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Pieces of all jobs as they come, each with its job's index."""
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


def problem_of(error: Exception, path: str) -> Problem | None:
    """What a client is told about an error; None: it is not the client's."""
    openai = path in _OPENAI
    if isinstance(error, Problem):
        if error.status == 422 and openai:
            return Problem(400, error.message, error.code, error.headers)
        return error
    if isinstance(error, UnknownAdapter):
        return Problem(404, str(error), "model_not_found" if openai else "adapter_not_found")
    if isinstance(error, Conflict):
        return Problem(409, str(error), "conflict")
    if isinstance(error, AdapterFailed):
        return Problem(500, "This adapter cannot be used; see the server's log.", "adapter_failed")
    if isinstance(error, NotStored):
        return Problem(507, str(error), "not_stored")
    if isinstance(error, InputError):
        return Problem(400 if openai else 422, str(error), "invalid")
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail), None, dict(error.headers or {}))
    return None


def told(server: Server, scope: Any, error: Exception) -> Problem:
    """What a client is told about an error; the log is told the rest."""
    problem = problem_of(error, scope["path"])
    if isinstance(error, AdapterFailed):
        scope["note"]["reason"] = str(error)
    if problem is None:
        scope["note"] |= described(error)
        problem = unexpected(scope["identity"])
    problem.message = server.store.public(problem.message)
    return problem


def create_app(server: Server) -> Any:
    """The ASGI application of a server, which loads the model in the background."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def start() -> None:
            try:
                await server.start()
            except Exception as error:
                server.fail(error)

        starting = asyncio.ensure_future(start())
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await server.stop()

    app = FastAPIOffline(
        title="ia3 serve",
        version=__version__,
        description='Any number of (IA)³ adapters of one model. Errors have OpenAI\'s form: {"error": {…}}.',
        lifespan=lifespan,
        redoc_url=None,
    )
    _add_pages(app, server)
    _add_adapters(app, server)
    _add_answers(app, server)
    _describe(app)

    async def tell(request: Request, error: Exception) -> Response:
        problem = told(server, request.scope, error)
        return JSONResponse(problem.body(), problem.status, problem.headers)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(ClientDisconnect, gone)
    for kind in (Problem, InputError, HTTPException, Exception):
        app.add_exception_handler(kind, tell)
    return Gate(app, server.limits, server.metrics, server.token, server.hosts)


async def _body(request: Request, kind: type[_Body]) -> _Body:
    """The JSON body of a request. Raises `Problem`."""
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content != "application/json":
        raise Problem(415, f"Expected 'Content-Type: application/json', found {content!r}.", "content_type")
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise Problem(422, f"Cannot use the body: {problems(error, 'body')}"[:1000], "invalid") from None


def _add_pages(app: FastAPI, server: Server) -> None:
    page = resources.files("ia3.serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/health", tags=["operation"])
    async def health() -> Any:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/ready", tags=["operation"])
    async def ready() -> Any:
        """200 when requests are answered; 503 while the model is loaded, and when the server shuts down."""
        if not server.ready:
            raise Problem(503, "Not ready.", "not_ready", {"Retry-After": "2"})
        return {"status": "ready"}

    @app.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", tags=["models"])
    async def models() -> Any:
        """The base model and all adapters, as OpenAI lists models."""
        server.require_started()
        names = [server.engine.name, *server.store.names]
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "ia3"} for name in names],
        }

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def model(name: str) -> Any:
        """One of them."""
        server.require_started()
        server.adapter(name)
        return {"id": name, "object": "model", "created": 0, "owned_by": "ia3"}


def _described(adapter: Adapter) -> dict[str, Any]:
    """An adapter for a client. Blocks."""
    found = adapter.settings()
    task = found.task
    return {
        "name": adapter.name,
        "columns": None if task is None else task.columns,
        "labels": None if task is None else task.labels,
        "description": None if task is None else task.description,
        "example": None if task is None else task.example,
        "calibrated": found.calibrated,
    }


def _add_adapters(app: FastAPI, server: Server) -> None:
    @app.get("/v1/adapters", tags=["adapters"])
    async def adapters() -> Any:
        """Names of all adapters."""
        server.require_started()
        return {"base": server.engine.name, "adapters": [{"name": name} for name in server.store.names]}

    @app.get("/v1/adapters/{name:path}", tags=["adapters"])
    async def adapter(name: str) -> Any:
        """An adapter: its columns and labels."""
        server.require_started()
        return await server.blocking(_described, server.store.get(name))

    @app.post("/v1/adapters", tags=["adapters"], status_code=201)
    async def admit(request: Request) -> Any:
        """Upload an adapter's files (multipart/form-data: `name`, `files`), or name a folder below the adapters' root
        (application/json). One that is served already is replaced; requests that are under way end with the old one."""
        server.require_started()
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            body = await _body(request, FolderBody)
            known = (body.folder if body.name is None else body.name) in server.store
            found = await server.store.admit(body.folder, body.name)
            return JSONResponse(await server.blocking(_described, found), 200 if known else 201)
        with server.uploads.room(1):
            try:
                async with request.form(max_files=8, max_fields=8) as form:
                    found, new = await _upload(server, form)
            except HTTPException as error:  # of the form's parser
                raise InputError(f"Expected multipart/form-data: {error.detail}") from error
        return JSONResponse(await server.blocking(_described, found), 201 if new else 200)

    @app.delete("/v1/adapters/{name:path}", tags=["adapters"])
    async def remove(name: str) -> Any:
        """Serve an adapter no more. Its files are deleted when they were uploaded."""
        server.require_started()
        await server.store.remove(name)
        return {"name": name, "deleted": True}


async def _upload(server: Server, form: FormData) -> tuple[Adapter, bool]:
    name = form.get("name")
    files = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
    if not isinstance(name, str) or set(form) - {"name", "files"}:
        raise InputError("Expected a form with the fields 'name' and 'files'.")
    named = {str(part.filename): _writer(part) for part in files}
    if len(named) != len(files):
        raise InputError("Expected files with different names.")
    return await server.store.upload(name, named)


def _writer(part: UploadFile) -> Callable[[Path], Awaitable[None]]:
    async def write(path: Path) -> None:
        with open(path, "wb") as file:
            while data := await part.read(1 << 20):
                file.write(data)

    return write


def _add_answers(app: FastAPI, server: Server) -> None:
    @app.post("/v1/classify", tags=["answers"])
    async def classify(request: Request) -> Any:
        """A label and each label's probability, for each text or row."""
        server.require_started()
        body = await _body(request, ClassifyBody)
        items = body.texts if body.texts is not None else body.rows or []
        note = request.scope["note"]
        note |= {"adapter": body.adapter[:100], "texts": len(items)}
        if server.log_texts:
            note["content"] = items
        if len(items) > server.limits.texts:
            raise Problem(422, f"Expected at most {server.limits.texts} texts, found {len(items)}.", "too_many")
        adapter = server.store.get(body.adapter)
        with server.queue.room(len(items)), server.store.using(adapter):
            return JSONResponse(await server.settle(request, server.classify(body, adapter)))

    @app.post("/v1/completions", tags=["answers"])
    async def completions(request: Request) -> Any:
        """OpenAI's completions; `model` is an adapter or the base model."""
        server.require_started()
        body = await _body(request, CompletionBody)
        if len(body.prompts) > server.limits.texts:
            raise Problem(
                400, f"Expected at most {server.limits.texts} prompts, found {len(body.prompts)}.", "too_many"
            )
        return await _generated(
            request, server, body, lambda: server.completion_prompts(body), body.max_tokens, _Completions(body.model)
        )

    @app.post("/v1/chat/completions", tags=["answers"])
    async def chat(request: Request) -> Any:
        """OpenAI's chat completions; `model` is an adapter or the base model."""
        server.require_started()
        body = await _body(request, ChatBody)
        wanted = body.max_completion_tokens or body.max_tokens
        return await _generated(request, server, body, lambda: server.chat_prompt(body), wanted, _Chat(body.model))


class _Completions:
    """The form of completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str) -> None:
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def chunk(self, index: int, text: str, finish: str | None, first: bool) -> dict[str, Any]:
        return self.choice(index, text, finish)


class _Chat(_Completions):
    """The form of chat completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}

    def chunk(self, index: int, text: str, finish: str | None, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


async def _generated(
    request: Request,
    server: Server,
    body: CompletionBody | ChatBody,
    prompts_of: Callable[[], list[list[int]]],
    wanted: int | None,
    form: _Completions,
) -> Response:
    note = request.scope["note"]
    note |= {"model": body.model[:100], "stream": body.stream}
    if server.log_texts:
        note["content"] = body.model_dump(include={"prompt", "messages"})
    if not server.engine.generates:
        raise InputError(f"{server.engine.name!r} continues no texts; use /v1/classify.")
    adapter = server.adapter(body.model)
    held = contextlib.ExitStack()
    with contextlib.ExitStack() as entered:
        entered.enter_context(server.queue.room(len(body.prompts) if isinstance(body, CompletionBody) else 1))
        entered.enter_context(server.store.using(adapter))
        prompts = await server.settle(request, server.blocking(prompts_of))
        jobs = server.jobs(body, adapter, prompts, wanted)
        pieces = server.generate(jobs)
        # What is wrong is found out before the first piece, when a status can still be given.
        first = await server.settle(request, anext(pieces))  # type: ignore[arg-type]
        held = entered.pop_all()
    usage_in = sum(map(len, prompts))
    if body.stream:
        options = body.stream_options
        events = _events(
            request, server, pieces, first, form, len(jobs), usage_in, bool(options and options.include_usage)
        )
        return _Stream(held, events)
    texts, finishes, tokens = [""] * len(jobs), [""] * len(jobs), [0] * len(jobs)

    async def rest() -> None:
        index, piece = first
        while True:
            texts[index] += piece.text
            finishes[index], tokens[index] = piece.finish or "", piece.tokens
            try:
                index, piece = await anext(pieces)
            except StopAsyncIteration:
                return

    with held:
        try:
            await server.settle(request, rest())
        finally:
            await pieces.aclose()
    choices = [form.choice(i, text, finish) for i, (text, finish) in enumerate(zip(texts, finishes, strict=True))]
    return JSONResponse({**form.head, "object": form.kind, "choices": choices, "usage": _usage(usage_in, sum(tokens))})


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _Stream(StreamingResponse):
    """Server-sent events; what they hold is let go even when the client leaves before the first."""

    def __init__(self, held: contextlib.ExitStack, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._held, self._events = held, events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._held:
            async with contextlib.aclosing(self._events):
                await super().__call__(scope, receive, send)


async def _events(
    request: Request,
    server: Server,
    pieces: AsyncGenerator[tuple[int, Piece], None],
    first: tuple[int, Piece],
    form: _Completions,
    count: int,
    usage_in: int,
    with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Server-sent events."""
    tokens = [0] * count
    started: set[int] = set()
    extra: dict[str, Any] = {"usage": None} if with_usage else {}

    def event(choices: list[dict], more: dict[str, Any]) -> bytes:
        return _event({**form.head, "object": form.chunk_kind, "choices": choices, **more})

    try:
        index, piece = first
        while True:
            tokens[index] = piece.tokens
            if piece.text or piece.finish or index not in started:
                yield event([form.chunk(index, piece.text, piece.finish, index not in started)], extra)
                started.add(index)
            try:
                index, piece = await asyncio.wait_for(anext(pieces), left(request.scope["deadline"]))
            except StopAsyncIteration:
                break
        if with_usage:
            yield event([], {"usage": _usage(usage_in, sum(tokens))})
        yield b"data: [DONE]\n\n"
    except Exception as error:
        request.scope["note"]["error"] = type(error).__name__
        late = isinstance(error, asyncio.TimeoutError)
        yield _event(told(server, request.scope, server.late() if late else error).body())
    finally:
        await pieces.aclose()


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _describe(app: FastAPI) -> None:
    """The bodies, which are read by hand, in the OpenAPI document."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            kinds = {**_BODIES, "/v1/adapters": FolderBody}
            _, definitions = models_json_schema(
                [(kind, "validation") for kind in kinds.values()], ref_template="#/components/schemas/{model}"
            )
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"token": []}]
            for path, kind in kinds.items():
                reference = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
                schema["paths"][path]["post"]["requestBody"] = {
                    "required": True,
                    "content": {"application/json": reference},
                }
            form = {
                "type": "object",
                "required": ["name", "files"],
                "properties": {
                    "name": {"type": "string"},
                    "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                },
            }
            schema["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]["multipart/form-data"] = {"schema": form}
        return app.openapi_schema or schema

    app.openapi = openapi  # type: ignore[method-assign]
