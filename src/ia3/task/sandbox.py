"""Jinja for untrusted templates: limits on a template before it is compiled, and on its work while it renders.

Jinja's own sandbox protects Python's internals from a template. But a template can still take minutes to compile, or
make
a text that does not fit into memory: `{{ "a" * 10**10 }}` is one line, and Jinja computes it at compile time. Here
nothing is computed at compile time, and each operation costs steps, by the size of what it reads, before it runs.
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

# Limits of a template: characters of its source, parts of its tree, and nesting depth. Python compiles at most 100
# nested blocks or 200 nested parentheses.
MOST_SOURCE, MOST_PARTS, DEEPEST = 100_000, 2_000, 50

# The limit of characters of a text that a template makes or reads, also of intermediate texts.
MOST_CHARACTERS = 10_000_000

# The limit of steps of one rendering. A step is an operation, a loop iteration, an item or 64 characters that an
# operation reads; all take about the same time. A call takes longer.
MOST_STEPS, _CHARACTERS_A_STEP, _STEPS_A_CALL = 2_000_000, 64, 8

# Limits of an integer (3,000 digits), and of a width, such as that of `center` or of JSON's indentation.
_MOST_BITS, _WIDEST, _WIDEST_JSON = 10_000, 10_000, 8

# Operations that can make a text many times longer: they multiply it by a width or by another text.
_WIDENING = {
    "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "to_bytes", "indent", "wordwrap", "tojson", "batch",
    "slice", "round",
}  # fmt: skip

_FORMATTING = {"%", "format", "format_map"}
_COMPUTED_WIDTH = re.compile(r"%[^A-Za-z%(]*\*|\{[^{}]+\{")


class TooLong(InputError):
    """A template's text is longer than the limit."""


class TooMuch(InputError):
    """A template takes more steps than the limit."""


@dataclass(frozen=True)
class _Limits:
    characters: int = MOST_CHARACTERS
    check: Callable[[], None] = lambda: None


_LIMITS: ContextVar[_Limits] = ContextVar("limits", default=_Limits())  # noqa: B039 (frozen)


@contextlib.contextmanager
def bounded(characters: int | None = None, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Limit the length of templates' texts in a `with` block on this thread. Longer texts raise `TooLong`.

    Args:
        characters: the limit; None, or more than the current limit: no change.
        check: called repeatedly while templates render and between other steps of work; it may raise to stop them.
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
    """The current limit of characters, see `bounded`."""
    return _LIMITS.get().characters


def checkpoint() -> None:
    """Call the current `check` between two steps of work, see `bounded`."""
    _LIMITS.get().check()


def parse(source: str) -> nodes.Template:
    """A template's tree, checked to be small enough to compile. Raises `ValueError` (one line)."""
    if len(source) > MOST_SOURCE:
        raise ValueError(f"expected a template of at most {MOST_SOURCE} characters, found {len(source)}")
    try:
        tokens = sum(1 for _ in islice(_ENVIRONMENT.lex(source), 10 * MOST_PARTS + 1))
        tree = _ENVIRONMENT.parse(source) if tokens <= 10 * MOST_PARTS else None
    except RecursionError:
        raise ValueError(f"expected a template of at most {DEEPEST} levels, found more") from None
    except (jinja2.TemplateError, ValueError) as error:  # ValueError: a number is too long
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
    """The variables that a template uses, as `jinja2.meta` finds them, but without computing constants."""
    generator = jinja2.meta.TrackingCodeGenerator(_ENVIRONMENT)
    generator.optimizer = None
    generator.visit(tree)
    return generator.undeclared_identifiers


def _error_in(error: Exception) -> ValueError:
    return ValueError(f"expected a Jinja template, found an error in it: {reason(error)[:200]}")


class _Code(CodeGenerator):
    """Python code of a template, in which operators that Jinja leaves to Python cost steps too."""

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
    """The remaining steps of a rendering."""

    def __init__(self, limits: _Limits) -> None:
        self.characters, self._left, self._check = limits.characters, MOST_STEPS, limits.check

    def pay(self, *values: Any, steps: int = 1) -> None:
        """Pay for an operation that takes `steps` and reads values. Raises `TooMuch`."""
        self._left -= steps + sum(map(_steps, values))
        if self._left < 0:
            raise TooMuch(f"it takes more than {MOST_STEPS} steps")
        self._check()


_WORK: ContextVar[_Work] = ContextVar("work")


def _steps(value: Any) -> int:
    """The steps to read a value once. Raises `TooMuch` if the value is larger than the limit."""
    items, characters, waiting = 0, 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            characters += str.__len__(one)  # len() of a cell with a list is that of the list
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
    """The maximum of characters of a value as text, without escapes."""
    return str.__len__(value) if isinstance(value, str) else _CHARACTERS_A_STEP * (1 + _steps(value))


def _number(value: Any) -> int | None:
    """A value as a count or width, if Python accepts it as one."""
    return operator.index(value) if hasattr(type(value), "__index__") else None


def _grown(name: str, first: Any, rest: list[Any]) -> int:
    """The maximum of characters that an operation (a filter, a method of `first`, an operator) makes; 0: it multiplies
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
    """Compiles and renders templates.

    Args:
        shown: converts a value to what is printed.
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
        del self.globals["lipsum"], self.filters["urlize"]  # useless and expensive
        for kind in (self.filters, self.tests):
            kind.update({name: _paid(name, function) for name, function in kind.items()})

    def compiled(self, tree: nodes.Template) -> jinja2.Template:
        """Compile a tree of `parse` to a template. Raises `ValueError` (one line)."""
        try:
            code = self.compile(tree)
        except Exception as error:  # Python's compiler has limits too
            raise _error_in(error) from error
        return jinja2.Template.from_code(self, code, self.make_globals(None))

    def rendered(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """Render a template. Raises `TooLong`, `TooMuch`, or the template's own errors."""
        token = _WORK.set(_Work(_LIMITS.get()))
        try:
            return template.render(values)
        finally:
            _WORK.reset(token)

    # The code of templates calls these.

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """Join the pieces of a text, or of a part of it."""
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
        """The operator `~`."""
        _WORK.get().pay(values)  # together they may be as long as one text
        return "".join(map(str, values))

    def paid(self, value: Any) -> Any:
        """Pay for a value that an operator reads or a slice has copied."""
        _WORK.get().pay(value)
        return value

    def turns(self, items: Iterable[Any]) -> Iterator[Any]:
        """Pay for each iteration of a loop."""
        for item in items:
            _WORK.get().pay()
            yield item

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Call a method, a macro or a function."""
        method = getattr(function, "__wrapped__", function)  # Jinja wraps `format`
        owner = [method.__self__] if hasattr(method, "__self__") else []
        run = functools.partial(super().call, context, function)
        _WORK.get().pay(steps=_STEPS_A_CALL)
        return _operate(getattr(method, "__name__", ""), run, owner, args, kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an arithmetic operator."""
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
    """Wrap a filter or test so that it costs steps."""

    @functools.wraps(function)  # keeps Jinja's marks
    def run(*args: Any, **kwargs: Any) -> Any:
        return _operate(name, function, [], args, kwargs)

    return run


def _operate(
    name: str, function: Callable[..., Any], owner: list[Any], args: Iterable[Any], kwargs: dict[str, Any]
) -> Any:
    """Pay for an operation on its owner, if it has one, and its arguments, and call it."""
    work = _WORK.get()  # raises an error if Jinja tries to compute a constant, because no work is set
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


# Arguments that Jinja adds.
_JINJAS = (jinja2.Environment, jinja2.runtime.Context, nodes.EvalContext)
_JINJAS_NAMES = ("_loop_vars", "_block_vars", "caller")

# Code that reads a tree of `parse` uses the rules of this environment.
_ENVIRONMENT = Environment()
