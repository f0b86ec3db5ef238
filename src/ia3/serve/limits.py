"""What a server takes: sizes, numbers, times."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

# The client has left: nobody reads this status, but logs and metrics (nginx' number for it).
CLIENT_GONE = 499

# About as long as a small model takes to read them on a processor; and a turn's longest wait.
_SECONDS_A_CHARACTER, _SECONDS_A_TOKEN, _LONGEST_WAIT = 0.00025, 0.001, 10.0


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        body_bytes: of a JSON body.
        upload_bytes: of an uploaded adapter, all files together.
        texts: texts, rows or prompts of a request.
        text_tokens: tokens of a prompt; None: as many as the model takes.
        text_characters: characters of a prompt, before it is tokenized; None: as many as `text_tokens` or the model's
            context can be (`most_characters`).
        new_tokens: tokens that a request may generate, a prompt.
        queue: texts accepted and not yet answered; further requests get 429.
        deadline: seconds from a request's head to its answer; then 504.
        uploads: at a time, each of which may take as much room for temporary files as its body is long; then 429.
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
    """What a client is told instead of an answer, in OpenAI's form.

    Attributes:
        status: the HTTP status.
        message: one line.
        code: for programs.
        headers: of the response.
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
    """How many texts, or other things, are accepted and not yet answered. Used on the event loop.

    Attributes:
        most: how many there may be.
        things: what they are, for the error message.
        length: how many there are.
    """

    most: int
    things: str = "texts"
    length: int = field(default=0, init=False)

    @contextlib.contextmanager
    def room(self, more: int) -> Iterator[None]:
        """Within `with`, so many are accepted. Raises `Problem` (429) when there is no room for them."""
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
    """When the turn of work that is asked for now comes (a time of `time.monotonic`).

    Work for shorter texts that comes within this time goes first; however long a text is, its turn comes.
    """
    return time.monotonic() + min(characters * _SECONDS_A_CHARACTER + tokens * _SECONDS_A_TOKEN, _LONGEST_WAIT)


def left(deadline: float) -> float:
    """Seconds until a time of `time.monotonic`, 0 when it has passed."""
    return max(0.0, deadline - time.monotonic())
