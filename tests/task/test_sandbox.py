"""Templates that would take minutes or all memory: refused before they are compiled, or given up while they render."""

import resource
import signal
import time

import psutil
import pytest
import yaml

from ia3 import InputError, Task, read_prompts
from ia3.task import sandbox
from ia3.task.template import Template

TEXT = "b" * 100_000

# Refused as they are read.
NESTED = {
    "not": "{{ " + "not " * 300 + "text }}",
    "filters": "{{ text" + "|trim" * 250 + " }}",
    "constants": "{{ 'a'" + "|trim" * 250 + " }}{{ text }}",
    "conditions": "{% if text %}" * 101 + "x" + "{% endif %}" * 101,
    "loops": "{% for x in [1] %}" * 25 + "{% endfor %}" * 25 + "{{ text }}",
    "attributes": "{{ text" + ".a" * 5000 + " }}",
    "sums": "{{ text" + " + text" * 300 + " }}",
    "parentheses": "{{ " + "(" * 50_000 + "text }}",
    "braces": "{" * 100_000,
    "many": "{{ text }} " * 1500,
    "source": "x" * 150_000,
    "number": "{{ " + "9" * 5000 + " }}{{ text }}",
    "recursive": "{% for x in [[1]] recursive %}{{ loop(x) }}{% endfor %}{{ text }}",
}

# Given up as they render.
GROWING = {
    "times": "{{ 'a' * 10**8 }}{{ text }}",
    "times a number": "{{ 10**8 * 'a' }}{{ text }}",
    "list": "{{ ([text] * 10**8)|length }}",
    "power": "{{ 10**(10**8) }}{{ text }}",
    "product": "{{ 9**9999 * 9**9999 * 9**9999 }}{{ text }}",
    "range": "{{ range(10**9) }}{{ text }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}{{ text }}",
    "empty loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}x{% endfor %}{% endfor %}{{ text }}",
    "concat": "{{ text" + " ~ text" * 249 + " }}",
    "outputs": "{{ text }}" * 250,
    "doubled": "{% set x = text %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "nested lists": "{% set x = [text] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}",
    "longer lists": "{% set x = [text] %}" + "{% set x = x + x %}" * 40 + "{{ x|length }}",
    "extended": "{% set x = [1] %}{% for i in range(40) %}{% set _ = x.extend(x) %}{% endfor %}{{ text }}",
    "namespaces": "{% set n = namespace(x=text) %}{% for i in range(40) %}"
    "{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "dicts": "{% set d = {} %}{% for i in range(60) %}{% set _ = d.update({i: d.copy()}) %}{% endfor %}{{ d }}{{ text }}",
    "center": "{{ text.center(10**9) }}",
    "center, a filter": "{{ text|center(10**9) }}",
    "center, mapped": "{{ [text]|map('center', 10**9)|list }}",
    "zfill": "{{ text.zfill(10**9) }}",
    "tabs": "{{ (text|replace('b', '\t')).expandtabs(10000) }}",
    "replace": "{{ text.replace('b', text) }}",
    "replace, a filter": "{{ text|replace(new=text, old='b') }}",
    "replace, a list": "{{ [1, 1, 1]|replace('1', text * 90) }}",
    "translate": "{{ text.translate({98: text}) }}",
    "join": "{{ text.join(range(99999)|map('string')) }}",
    "join, a filter": "{{ range(99999)|join(text) }}",
    "join, a text": "{{ text|join(text) }}",
    "indent": "{{ (text|replace('b', '\n'))|indent(9999) }}",
    "wordwrap": "{{ text|wordwrap(1, wrapstring=text) }}",
    "tojson": "{{ [[text]]|tojson(9999) }}",
    "batch": "{{ [text]|batch(999999999, 'x')|list }}",
    "slice": "{{ [text]|slice(999999999)|list }}",
    "round": "{{ 1|round(3000000, 'ceil') }}{{ text }}",
    "bytes": "{{ 1.to_bytes(10**9, 'big') }}{{ text }}",
    "sum": "{{ ([[1] * 100] * 1000)|sum(start=[])|length }}{{ text }}",
    "percent": "{{ '%9999999999d' % 1 }}{{ text }}",
    "percent, a filter": "{{ '%9999999999d'|format(1) }}{{ text }}",
    "percent, a list": "{{ ['%9999999999d']|format(1) }}{{ text }}",
    "percent, bytes": "{{ ('%9999999999d'.encode()) % 1 }}{{ text }}",
    "percent, computed": "{{ '%*d' % (10**9, 1) }}{{ text }}",
    "percent, often": "{{ text.replace('b', '%(a)s') % {'a': text} }}",
    "format": "{{ '{:>9999999999}'.format(text) }}",
    "format, computed": "{{ '{:{w}}'.format(text, w=10**9) }}",
    "format, often": "{{ ('{a}' * 10000).format(a=text) }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}{{ text }}",
    "endless": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}{{ text }}",
    "blocks": "{% set x %}{% for i in range(99999) %}" + "y" * 50_000 + "{% endfor %}{% endset %}{{ text }}",
    "data": "{% for i in range(99999) %}" + "y" * 50_000 + "{% endfor %}{{ text }}",
    "members": "{% for i in range(99999) %}{% if i in range(99999)|list %}{% endif %}{% endfor %}{{ text }}",
    "slices": "{% for i in range(99999) %}{% if text[:99999] == text[1:] %}{% endif %}{% endfor %}{{ text }}",
    "escapes": "{{ text" + "|tojson" * 40 + " }}",
    "characters": "{{ (text * 90)|list|length }}{{ text }}",
}


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    """What is not refused ends by a lack of memory, or by an alarm, and not with the machine."""
    monkeypatch.setattr(sandbox, "MOST_STEPS", 200_000)
    taken = psutil.Process().memory_info().vms
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), before[1]))
    signal.alarm(60)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, before)


def check(says: str, make) -> None:
    with pytest.raises(InputError, match=says) as error:
        make()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and "MemoryError" not in str(error.value)


@pytest.mark.parametrize("kind", NESTED)
def test_what_is_too_much_to_compile(kind, tmp_path):
    """Wherever it comes from: a prompt, an answer, a right answer, a file, a collection."""
    source = NESTED[kind]
    says = "expected a (template of at most|Jinja template, found|template without)"
    check(says, lambda: Task.create({"template": source, "choices": ["a", "b"]}))
    check(says, lambda: Task.create({"template": "{{ text }}", "choices": {"a": source + "{{ text }}", "b": "no"}}))
    check(says, lambda: Task.create({"templates": [{"prompt": "{{ text }}", "target": source}], "choices": ["a", "b"]}))
    check(says, lambda: Task.create({"template": "{{ text }}", "choices": source}))
    with pytest.raises(ValueError, match=says):
        Template(prompt=source)
    entry = {"jinja": f"{source} ||| a", "answer_choices": "a ||| b", "metadata": {"original_task": "true"}}
    (tmp_path / "templates.yaml").write_text(yaml.dump({"templates": {"x": entry}}))
    check(says, lambda: read_prompts(tmp_path / "templates.yaml"))


@pytest.mark.parametrize("kind", GROWING)
def test_what_is_too_much_to_render(kind):
    """Nothing of it is computed when it is compiled, or looked at for its columns."""
    task = Task.create({"template": GROWING[kind], "choices": ["a", "b"]})
    assert "text" in task.columns
    check("Cannot render the template|at most .* characters", lambda: task.prompt({"text": TEXT}, 3))
    answers = Task.create({"template": "{{ text }}", "choices": {"a": GROWING[kind], "b": "no"}})
    check("Cannot render the template|at most .* characters", lambda: answers.answers({"text": TEXT}, 3))


def test_numbers_in_texts_are_numbers_to_nobody():
    """Digits of a file count as positions in right answers, but multiply nothing."""
    prompt = "{{ text }} ||| {{ 'a' * row.n }}{{ 'a'.center(row.n) }}"
    task = Task.create({"template": prompt, "choices": ["a", "b"]})
    check("Cannot render", lambda: task.label({"text": "a", "n": "9999999999"}, 3))


def test_all_answers_of_a_row_together_are_bounded():
    choices = {str(number): f"{{{{ text }}}}{number}" for number in range(100)}
    task = Task.create({"template": "{{ text }}", "choices": choices})
    row = {"text": "a" * 90}
    assert len(task.answers(row)) == 100
    with sandbox.bounded(5000):
        check("at most .* characters, found more", lambda: task.answers(row))
        assert task.prompt(row) == row["text"]
    assert len(task.answers(row)) == 100


def test_ordinary_templates_are_what_they_were():
    template = (
        "{% set n = namespace(k=0) %}{% for w in text.split() if w != 'b' %}{{ loop.index }}/{{ loop.length }}"
        "{% if not loop.last %}, {% endif %}{% set n.k = n.k + w|length %}{% endfor %} {{ n.k }} {{ text[2:5] ~ 7 * 6 ~ '!' }}"
        "{% macro f(x) %}<{{ x|upper }}>{% endmacro %}{{ f(text[0]) }} {{ ['x', 'y']|join('-') }} {{ '%5.2f|%s' % (1.5, 'z') }}"
        "{{ '{:>3}'.format('q') }} {{ 'a,b'.replace(',', ';') }} {{ 'ab'.center(6) }}| {{ {'k': [1]}|tojson }} "
        "{{ 'yes' if 'a' in text and 1 < 2 <= 2 else 'no' }} {{ zip([1, 2], 'uv')|list }} {{ 2 ** 10 }} {{ -3 // 2 }}"
    )
    prompt = Task.create({"template": template, "choices": ["a", "b"]}).prompt({"text": "a b ccc"})
    assert prompt == (
        "1/2, 2/2 4 b c42!<A> x-y  1.50|z  q a;b   ab  | {\"k\": [1]} yes [(1, 'u'), (2, 'v')] 1024 -2"
    ), prompt


def test_the_caller_may_ask_for_less_and_for_an_end():
    task = Task.create({"template": "{% for i in range(99) %}{{ text }}{% endfor %}", "choices": ["a", "b"]})
    row = {"text": "ab"}
    with sandbox.bounded(198), sandbox.bounded(1000):
        assert len(task.prompt(row)) == 198
    with sandbox.bounded(197), pytest.raises(sandbox.TooLong, match=r"at most 197 characters, found more \(row 3\)"):
        task.prompt(row, 3)
    calls = []

    def leave():
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt

    with sandbox.bounded(check=leave), pytest.raises(KeyboardInterrupt):
        task.prompt(row)
    assert len(calls) == 10
    assert len(task.prompt(row)) == 198


def test_many_labels_take_little_time(tmp_path):
    """Quadratic work, or a template that is compiled for each, would take several times as long."""
    count = 20_000
    labels = {f"label {i}": f"answer {i}" for i in range(count)}
    (tmp_path / "task.yaml").write_text(
        "template: '{{ text }}'\nchoices:\n" + "".join(f"  {k}: {v}\n" for k, v in labels.items())
    )
    started = time.process_time()
    assert Task.from_file(tmp_path / "task.yaml").labels == list(labels)
    aliases = {f"alias {i}": f"label {i}" for i in range(count)}
    task = Task.create({"template": "{{ text }}", "choices": labels, "aliases": aliases})
    assert task.label({"text": "a", "label": f"alias {count - 1}"}) == f"label {count - 1}"
    assert len(task.answers({"text": "a"})) == count and task.columns == ["text"]
    assert time.process_time() - started < 9


def test_as_many_templates_as_are_compiled_in_reasonable_time():
    task = {"template": "{{ text }}", "choices": {str(i): f"{{{{ text }}}} {i}" for i in range(257)}}
    check("at most 256 answers that are templates, found 257", lambda: Task.create(task))
    check("at most 256 templates", lambda: Task.create({"templates": ["{{ text }}"] * 257, "choices": ["a", "b"]}))
    long = ["{{ text }}" + "x" * 50_000] * 5
    check("of 200000 characters together", lambda: Task.create({"templates": long, "choices": ["a", "b"]}))
    message = {"template": "{{ text }}", "choices": {str(i): "same" for i in range(6000)}}
    check("differ and are not empty, found .{1,300}$", lambda: Task.create(message))
