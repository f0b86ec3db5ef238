"""The routes in OpenAI's form: completions and chat completions, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ia3.errors import InputError
from ia3.serve.engine import Piece
from ia3.serve.limits import Problem, left
from ia3.serve.schemas import ChatBody, CompletionBody, read_body
from ia3.serve.server import Server, told

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_routes(app: FastAPI, server: Server) -> None:
    """Completions and chat completions."""

    @app.post("/v1/completions", tags=["answers"])
    async def completions(request: Request) -> Any:
        """OpenAI's completions; `model` is an adapter or the base model."""
        server.require_started()
        body = await read_body(request, CompletionBody)
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
        body = await read_body(request, ChatBody)
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
    prompts_of: Callable[[], Coroutine[Any, Any, list[list[int]]]],
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
        prompts = await server.settle(request, prompts_of())
        jobs = server.jobs(body, adapter, prompts, wanted)
        pieces = server.generate(jobs)
        # Wait for the first piece, so that errors before it still get a status.
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
    """Server-sent events, which release their resources even if the client disconnects before the first."""

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
