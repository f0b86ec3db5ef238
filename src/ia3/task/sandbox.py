"""Jinja for templates of strangers: bounds on a template before it is compiled, and on its work while it renders.

Jinja's own sandbox keeps a template away from Python's internals. It does not keep it from taking minutes to compile, or
from making a text that memory does not hold: `{{ "a" * 10**10 }}` is one line, and Jinja computes it at compile time.
Here nothing is computed at compile time, and every operation is paid for, by the size of what it reads, before it runs.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes as nodes
import jinja2.runtime
import jinja2.sandbox
from jinja2.compiler import CodeGenerator, operators
from jinja2.utils import Namespace

from ia3.errors import InputError, reason

# Of a template: characters of its source, parts of its tree, and how deep they are nested. Python compiles no more than 100
# blocks or 200 parentheses inside each other.
MOST_SOURCE, MOST_PARTS, DEEPEST = 100_000, 2_000, 50

# Of a text that a template makes or works on, also in between.
MOST_CHARACTERS = 10_000_000

# Of one rendering: a step is an operation, a turn of a loop, an item or 64 characters that an operation reads, all of which
# take about as long; a call takes longer.
MOST_STEPS, _CHARACTERS_A_STEP, _STEPS_A_CALL = 2_000_000, 64, 8

# Of a whole number (3,000 digits); and of what a text is widened by, such as `center` takes, or JSON's indentation.
_MOST_BITS, _WIDEST, _WIDEST_JSON = 10_000, 10_000, 8

# What can make more of a text than a few times its length: they multiply it by a width, or by another text.
_WIDENING = {
    "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "to_bytes", "indent", "wordwrap", "tojson", "batch",
    "slice", "round",
}  # fmt: skip

_FORMATTING = {"%", "format", "format_map"}
_COMPUTED_WIDTH = re.compile(r"%[^A-Za-z%(]*\*|\{[^{}]+\{")


class TooLong(InputError):
    """A template gives more characters than are wanted."""


class TooMuch(InputError):
    """A template is more work than a prompt can be worth."""


@dataclass(frozen=True)
class _Limits:
    characters: int = MOST_CHARACTERS
    check: Callable[[], None] = lambda: None


_LIMITS: ContextVar[_Limits] = ContextVar("limits", default=_Limits())  # noqa: B039 (frozen)


@contextlib.contextmanager
def bounded(characters: int | None = None, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Within `with`, on this thread, templates give texts of at most so many characters, else `TooLong`.

    Args:
        characters: None, or more than are allowed already: no change.
        check: called again and again while templates render and between other steps of work; what it raises ends them.
    """
    now = _LIMITS.get()
    token = _LIMITS.set(
        _Limits(now.characters if characters is None else min(characters, now.characters), check or now.check)
    )
    try:
        yield
    finally:
        _LIMITS.reset(token)


def most_characters() -> int:
    """How many characters a template may give here, see `bounded`."""
    return _LIMITS.get().characters


def checkpoint() -> None:
    """A place between two steps of work: raises when nobody waits for them any more, see `bounded`."""
    _LIMITS.get().check()


def parse(source: str) -> nodes.Template:
    """A template's tree, which is small enough to be compiled. Raises `ValueError` (one line)."""
    if len(source) > MOST_SOURCE:
        raise ValueError(f"expected a template of at most {MOST_SOURCE} characters, found {len(source)}")
    try:
        tokens = sum(1 for _ in islice(_ENVIRONMENT.lex(source), 10 * MOST_PARTS + 1))
        tree = _ENVIRONMENT.parse(source) if tokens <= 10 * MOST_PARTS else None
    except RecursionError:
        raise ValueError(f"expected a template of at most {DEEPEST} levels, found more") from None
    except (jinja2.TemplateError, ValueError) as error:  # the latter of numbers that are too long
        raise _error_in(error) from error
    level, depth, parts = [tree] if tree is not None else [], 0, 0
    while level:
        depth, parts = depth + 1, parts + len(level)
        if depth > DEEPEST:
            raise ValueError(f"expected a template of at most {DEEPEST} levels, found more")
        if any(isinstance(node, nodes.For) and node.recursive for node in level):
            raise ValueError("expected a template without recursive loops, found one")
        level = [child for node in level for child in node.iter_child_nodes()]
    if tree is None or parts > MOST_PARTS:
        raise ValueError(f"expected a template of at most {MOST_PARTS} parts, found more")
    return tree


def names_in(tree: nodes.Template) -> set[str]:
    """The names that a template expects to be given: `jinja2.meta` finds them, here without computing constants."""
    generator = jinja2.meta.TrackingCodeGenerator(_ENVIRONMENT)
    generator.optimizer = None
    generator.visit(tree)
    return generator.undeclared_identifiers


def _error_in(error: Exception) -> ValueError:
    return ValueError(f"expected a Jinja template, found an error in it: {reason(error)[:200]}")


class _Code(CodeGenerator):
    """Python code of a template, in which what Jinja leaves to Python's operators is paid for as well."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        copies = isinstance(node.arg, nodes.Slice)
        self.write("environment.paid(" if copies else "(")
        super().visit_Getitem(node, frame)
        self.write(")")

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        self.write("(environment.paid(")
        self.visit(node.expr, frame)
        self.write(")")
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Any) -> None:
        self.write(f" {operators[node.op]} environment.paid(")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        node.iter = nodes.Call(nodes.EnvironmentAttribute("turns"), [node.iter], [], None, None)
        super().visit_For(node, frame)


class _Work:
    """What a rendering may still do."""

    def __init__(self, limits: _Limits) -> None:
        self.characters, self._left, self._check = limits.characters, MOST_STEPS, limits.check

    def pay(self, *values: Any, steps: int = 1) -> None:
        """For an operation that takes so many steps and reads values. Raises `TooMuch`."""
        self._left -= steps + sum(map(_steps, values))
        if self._left < 0:
            raise TooMuch(f"it takes more than {MOST_STEPS} steps")
        self._check()


_WORK: ContextVar[_Work] = ContextVar("work")


def _steps(value: Any) -> int:
    """Steps that it takes to go through a value once. Raises `TooMuch` when it is larger than any may be."""
    items, characters, waiting = 0, 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            characters += str.__len__(one)  # the length of a cell that holds a list is that of the list
        elif isinstance(one, bytes):
            characters += len(one)
        elif isinstance(one, int):
            characters += one.bit_length() // 8
        elif isinstance(one, range):
            items += len(one)
        elif isinstance(one, (list, tuple, set, frozenset)):
            waiting.extend(one)
        elif isinstance(one, Mapping):
            waiting.extend(one)
            waiting.extend(one.values())
        elif isinstance(one, Namespace):
            waiting.append(one._Namespace__attrs)  # type: ignore[attr-defined]
        items += 1
        if items + len(waiting) > MOST_STEPS:
            raise TooMuch(f"a value in it has more than {MOST_STEPS} items")
        _check_length(characters)
    return items - 1 + characters // _CHARACTERS_A_STEP


def _check_length(characters: int) -> None:
    if characters > MOST_CHARACTERS:
        raise TooMuch(f"a text in it is longer than {MOST_CHARACTERS} characters")


def _length(value: Any) -> int:
    """How many characters a value has as text, at most, but for escapes."""
    return str.__len__(value) if isinstance(value, str) else _CHARACTERS_A_STEP * (1 + _steps(value))


def _number(value: Any) -> int | None:
    """A value as a number of times or places, where it is one to Python."""
    return operator.index(value) if hasattr(type(value), "__index__") else None


def _grown(name: str, first: Any, rest: list[Any]) -> int:
    """How many characters an operation (a filter, a method of `first`, an operator) makes at most; 0: it multiplies
    nothing."""
    text = first.decode("latin-1") if isinstance(first, bytes) else first if isinstance(first, str) else None
    numbers = [abs(number) for number in map(_number, rest) if number is not None]
    lengths = [_length(value) for value in rest if _number(value) is None]
    if name in _WIDENING:
        widest = _WIDEST_JSON if name == "tojson" else _WIDEST
        if max(numbers, default=0) > widest:
            raise TooMuch(f"expected widths of at most {widest}, found {max(numbers)}")
        places = _steps(first) if text is None else text.count("\n") + text.count("\t")
        return _length(first) * (1 + sum(lengths)) + (1 + places) * sum(numbers)
    if name in _FORMATTING and not isinstance(first, (int, float)):
        text = str(first) if text is None else text
        if _COMPUTED_WIDTH.search(text):
            raise TooMuch("expected formats whose widths are numbers")
        fields = text.count("%") + text.count("{")
        widths = (int(digits[:20]) for digits in re.findall(r"\d+", text))
        return len(text) + sum(widths) + fields * sum(lengths)
    if name == "replace" and len(rest) > 1:
        times = text.count(rest[0]) if text is not None and isinstance(rest[0], str) else _length(first)
        return _length(first) + times * _length(rest[1])
    if name == "join" and rest:
        parts, separator = (rest[0], first) if text is not None else (first, rest[0])
        many = _length(parts) if isinstance(parts, (str, bytes)) else _steps(parts)
        return _length(parts) + many * _length(separator)
    return 0


class Environment(jinja2.sandbox.SandboxedEnvironment):
    """Where templates are compiled and rendered.

    Args:
        shown: what a value is printed as.
    """

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)
    code_generator_class = _Code

    def __init__(self, shown: Callable[[Any], Any] = lambda value: value) -> None:
        @jinja2.pass_context  # so that Jinja does not print constants when it compiles
        def finalize(context: Any, value: Any) -> Any:
            _WORK.get().pay(value)
            return shown(value)

        super().__init__(undefined=jinja2.StrictUndefined, optimized=False, finalize=finalize)
        self.globals["zip"] = zip  # published templates use it
        del self.globals["lipsum"], self.filters["urlize"]  # no use, and much work
        for kind in (self.filters, self.tests):
            kind.update({name: _paid(name, function) for name, function in kind.items()})

    def compiled(self, tree: nodes.Template) -> jinja2.Template:
        """A tree of `parse` as a template. Raises `ValueError` (one line)."""
        try:
            code = self.compile(tree)
        except Exception as error:  # Python's compiler has limits of its own
            raise _error_in(error) from error
        return jinja2.Template.from_code(self, code, self.make_globals(None))

    def rendered(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """What a template gives. Raises `TooLong`, `TooMuch`, or what is wrong in it."""
        token = _WORK.set(_Work(_LIMITS.get()))
        try:
            return template.render(values)
        finally:
            _WORK.reset(token)

    # What the code of templates calls.

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """The pieces of a text, or of a part of it."""
        found, left = [], _WORK.get().characters
        for piece in pieces:
            left -= len(piece)
            if left < 0:
                raise TooLong(
                    f"Expected a text of at most {_WORK.get().characters} characters, found more",
                    "shorten the row or the template",
                )
            found.append(piece)
        return "".join(found)

    def joined(self, values: tuple[Any, ...]) -> str:
        """`~`."""
        _WORK.get().pay(values)  # together they are no longer than one may be
        return "".join(map(str, values))

    def paid(self, value: Any) -> Any:
        """What an operator reads, or a slice has copied."""
        _WORK.get().pay(value)
        return value

    def turns(self, items: Iterable[Any]) -> Iterator[Any]:
        """Of a loop."""
        for item in items:
            _WORK.get().pay()
            yield item

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A method, a macro, a function."""
        method = getattr(function, "__wrapped__", function)  # Jinja wraps `format`
        owner = [method.__self__] if hasattr(method, "__self__") else []
        run = functools.partial(super().call, context, function)
        _WORK.get().pay(steps=_STEPS_A_CALL)
        return _operate(getattr(method, "__name__", ""), run, owner, args, kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator of arithmetic."""
        if isinstance(left, int) and isinstance(right, int):
            bits = {"**": left.bit_length() * right, "*": left.bit_length() + right.bit_length()}.get(operator, 0)
            if bits > _MOST_BITS:
                raise TooMuch(f"a number in it has more than {_MOST_BITS} bits")
        elif operator == "*":
            many, times = (right, _number(left)) if isinstance(left, int) else (left, _number(right))
            _check_length(_length(many) * (times or 0))
        run = functools.partial(super().call_binop, context, operator)
        return _operate(operator, run, [], (left, right), {})


def _paid(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that is paid for."""

    @functools.wraps(function)  # with what Jinja notes at it
    def run(*args: Any, **kwargs: Any) -> Any:
        return _operate(name, function, [], args, kwargs)

    return run


def _operate(
    name: str, function: Callable[..., Any], owner: list[Any], args: Iterable[Any], kwargs: dict[str, Any]
) -> Any:
    """Call what is an operation on its owner, if it has one, and its arguments."""
    work = _WORK.get()  # there is none, and so an error, where Jinja tries to compute a constant
    if name == "replace":  # the order counts
        args = [*args, *(kwargs.pop(key) for key in ("old", "new", "count") if key in kwargs)]
    args = [list(islice(value, MOST_STEPS)) if isinstance(value, Iterator) else value for value in args]
    given = [*args, *(value for key, value in kwargs.items() if key not in _JINJAS_NAMES)]
    seen = [*owner, *(value for value in given if not isinstance(value, _JINJAS))]
    work.pay(*seen)
    if seen:
        _check_length(_grown(name, seen[0], seen[1:]))
    if name == "sum" and any(isinstance(value, (list, tuple)) for value in seen[1:]):
        raise TooMuch("expected a sum of numbers")
    found = function(*args, **kwargs)
    work.pay(found)
    return found


# What Jinja passes along.
_JINJAS = (jinja2.Environment, jinja2.runtime.Context, nodes.EvalContext)
_JINJAS_NAMES = ("_loop_vars", "_block_vars", "caller")

# Whatever looks at a tree of `parse` does so by this environment's rules.
_ENVIRONMENT = Environment()
