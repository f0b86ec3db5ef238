"""Request bodies. Unknown fields are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ia3.errors import problems
from ia3.serve.limits import Problem

if TYPE_CHECKING:
    from starlette.requests import Request

_Body = TypeVar("_Body", bound="Body")

Value = str | int | float | bool | None

# Default values of unsupported fields. OpenAI's clients may send them.
_UNSET: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
}


class Body(BaseModel):
    """A JSON object with known fields and finite numbers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def without_nulls(values: Any) -> Any:
    """A JSON object without nulls, which clients send for default values."""
    return {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values


class ClassifyBody(Body):
    """Texts, or rows of several columns, to label with an adapter, or with several, each in its own task."""

    adapter: str | None = Field(None, description="Its name, as in GET /v1/adapters.")
    adapters: Literal["*"] | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="Names of several, instead of adapter, or '*' for all: each answers each text."
    )
    texts: list[str] | None = Field(None, min_length=1, description="For tasks with one column.")
    rows: list[dict[str, Value]] | None = Field(None, min_length=1, description="Column → value, instead of texts.")
    abstain_below: float = Field(
        0.0, ge=0, le=1, description="Give no label where the best one's probability is lower."
    )
    without_adapter: bool = Field(False, description="Ask the base model the adapter's task instead.")

    @model_validator(mode="after")
    def _one_of_both(self) -> ClassifyBody:
        if (self.adapter is None) == (self.adapters is None):
            raise ValueError("expected adapter or adapters, one of the two")
        if (self.texts is None) == (self.rows is None):
            raise ValueError("expected texts or rows, one of the two")
        return self

    @property
    def items(self) -> list[Any]:
        """The texts, or the rows."""
        return self.texts if self.texts is not None else self.rows or []


class FolderBody(Body):
    """A folder below the adapters' root, to serve or read again."""

    folder: str
    name: str | None = Field(None, description="By default the folder's path.")


_Label = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=60)]


class TableBody(Body):
    """A table, to see its columns."""

    table: str = Field(description="CSV, with the columns' names in its first line.")


class ProjectBody(TableBody):
    """A table whose rows are to be labelled."""

    name: str = Field(description="For the project and its adapter: letters, digits, '.', '_' and '-'.")
    column: str = Field(description="The column of the text.")
    labels: list[_Label] = Field([], description="Further to those in the table.")
    label_column: str | None = Field(None, description="The column with labels so far; by default no row has one.")


class LabelsBody(Body):
    """All labels of a project."""

    labels: list[_Label]


class LabelBody(Body):
    """The label of a row."""

    label: str | None = Field(description="null: the row is skipped.")


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


# Each stop text is searched for at every token.
_Stop = Annotated[str, Field(max_length=1000)]


class _Generation(Body):
    model: str = Field(description="An adapter's name, or the base model's.")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_that_is_not_supported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, neutral in _UNSET.items():
            # False equals 0 in Python, but not for OpenAI.
            known = [each for each in neutral if isinstance(each, bool) is isinstance(values.get(name), bool)]
            if values.get(name) is not None and values[name] not in known:
                raise ValueError(f"{name} is not supported, except as {neutral[0]!r}")
        return {key: value for key, value in without_nulls(values).items() if key not in _UNSET}

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or []))


_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionBody(_Generation):
    """OpenAI's `completions`."""

    prompt: str | _Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[_Tokens], Field(min_length=1)]
    max_tokens: int = Field(16, ge=1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or tokens."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a conversation."""

    role: Annotated[str, StringConstraints(pattern="^(system|developer|user|assistant)$")]
    content: str | list[TextPart]
    name: str | None = None

    # Clients send earlier responses back, which have unsupported fields such as `refusal`.
    _nulls = model_validator(mode="before")(without_nulls)

    @property
    def text(self) -> str:
        """The message's text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(_Generation):
    """OpenAI's `chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


async def read_body(request: Request, kind: type[_Body]) -> _Body:
    """The JSON body of a request. Raises `Problem`."""
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content != "application/json":
        raise Problem(415, f"Expected 'Content-Type: application/json', found {content!r}.", "content_type")
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise Problem(422, f"Cannot use the body: {problems(error, 'body')}"[:1000], "invalid") from None
