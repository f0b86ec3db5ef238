"""Limits of a server: sizes, numbers, times."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

# The client disconnected. Only logs and metrics use this status (nginx' number for it).
CLIENT_GONE = 499

# About the time of a small model on a CPU to read them; and the longest wait for a turn.
_SECONDS_A_CHARACTER, _SECONDS_A_TOKEN, _LONGEST_WAIT = 0.00025, 0.001, 10.0


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        body_bytes: bytes of a JSON body.
        upload_bytes: bytes of an uploaded adapter, all files together.
        texts: texts, rows or prompts per request.
        text_tokens: tokens per prompt; None: the model's context.
        text_characters: characters per prompt, checked before tokenization; None: the maximum for `text_tokens` or the
            model's context (`most_characters`).
        new_tokens: new tokens per prompt.
        queue: accepted texts without an answer yet; further requests get 429.
        deadline: seconds from a request's head to its response; then 504.
        uploads: uploads at once, each of which may need temporary files as large as its body; further ones get 429.
    """

    body_bytes: int = 1 << 20
    upload_bytes: int = 64 << 20
    texts: int = 64
    text_tokens: int | None = None
    new_tokens: int = 1024
    queue: int = 1024
    deadline: float = 60.0
    uploads: int = 4
    text_characters: int | None = None


class Problem(Exception):
    """An error response in OpenAI's form.

    Attributes:
        status: the HTTP status.
        message: one line for people.
        code: a code for programs.
        headers: the response's headers.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, " ".join(message.split()), code, headers or {}

    def body(self) -> dict:
        """The JSON of the response."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


@dataclass
class Queue:
    """Counts accepted texts, or other items, without an answer yet. Used on the event loop.

    Attributes:
        most: the maximum.
        things: the items' name for the error message.
        length: the current number.
    """

    most: int
    things: str = "texts"
    length: int = field(default=0, init=False)

    @contextlib.contextmanager
    def room(self, more: int) -> Iterator[None]:
        """Accept `more` items during a `with` block. Raises `Problem` (429) if there is no room."""
        if self.length + more > self.most:
            raise Problem(
                429,
                f"The queue is full: {self.length} {self.things} are under way, {self.most} may be; try again soon.",
                "queue_full",
                {"Retry-After": "1"},
            )
        self.length += more
        try:
            yield
        finally:
            self.length -= more


def turn_of(characters: int = 0, tokens: int = 0) -> float:
    """The turn of work that is requested now, a time of `time.monotonic`.

    Work for shorter texts that arrives within this time goes first. The wait is limited, so long texts also get their
    turn.
    """
    return time.monotonic() + min(characters * _SECONDS_A_CHARACTER + tokens * _SECONDS_A_TOKEN, _LONGEST_WAIT)


def left(deadline: float) -> float:
    """Seconds until a time of `time.monotonic`; 0 if it has passed."""
    return max(0.0, deadline - time.monotonic())
