"""The command line end to end, on a tiny model: what it writes, prints, and says about bad input."""

import json
import os
import resource
import shutil
import subprocess
import sys

import datasets
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from ia3 import AdapterFolder, Task, predict, read_rows
from ia3.cli import main
from ia3.evaluation.running import Running
from support import tiny, words

CHOICES = "pos=good,neg=not good"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, its tokenizer, rows, and an adapter trained on them."""
    folder = tmp_path_factory.mktemp("place")
    words.save_model(folder / "model")
    words.write_csv(folder / "train.csv", words.rows(60))
    words.write_csv(folder / "test.csv", words.rows(30, seed=1))
    arguments = [
        "train",
        "--model",
        folder / "model",
        "--data",
        folder / "train.csv",
        "--test-data",
        folder / "test.csv",
    ]
    arguments += ["--template", words.TEMPLATE, "--choices", CHOICES, "--steps", "8"]
    for name, options in {"adapter": (), "for-peft": ("--acts-from", "start", "--opinions", "vectors")}.items():
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in [*arguments, *options, "--output", folder / name]])
        assert not ended.value.code
    return folder


@pytest.fixture
def train(ia3, place, tmp_path):
    """`ia3 train` on the tiny model with usual options, some of them changed; None leaves one out."""

    def run(*more, **changes):
        options = {
            "model": place / "model",
            "data": place / "train.csv",
            "test_data": place / "test.csv",
            "template": words.TEMPLATE,
            "choices": CHOICES,
            "steps": 4,
            "output": tmp_path / "out",
            **changes,
        }
        return ia3("train", *more, **options)

    return run


class TestTrain:
    def test_writes_an_adapter_a_task_metrics_and_a_card(self, place):
        files = sorted(path.name for path in (place / "adapter").iterdir())
        assert files == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "calibration.json",
            "head.safetensors",
            "metrics.json",
            "opinions.json",
            "recipe.yaml",
            "report.html",
            "task.yaml",
        ]
        metrics = json.loads((place / "adapter" / "metrics.json").read_text())
        for key in ("zero_shot", "trained", "majority"):
            assert set(metrics[key]) == {"accuracy", "macro_f1"}
        assert metrics["majority"]["accuracy"] == 0.5
        assert metrics["trainable_parameters"] == 2 * (16 + 16 + 48)
        assert metrics["adapter_bytes"] == (place / "adapter" / "adapter_model.safetensors").stat().st_size
        assert metrics["train_seconds"] > 0 and metrics["steps"] == 8 and metrics["train_examples"] == 32
        assert f"{metrics['trained']['accuracy']:.1%}" in (place / "adapter" / "README.md").read_text()
        assert Task.from_file(place / "adapter" / "task.yaml").templates[0].prompt == words.TEMPLATE
        assert json.loads((place / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            place / "model"
        )

    def test_a_report_elsewhere_and_a_learning_curve(self, train, tmp_path):
        code, out, err = train("--json", report=tmp_path / "pages" / "tea.html", learning_curve="2,4")
        assert code == 0, err
        results = json.loads(out)
        assert [one["train_examples"] for one in results["learning_curve"]] == [4, 8]
        assert not (tmp_path / "out" / "report.html").exists()
        assert os.listdir(tmp_path / "pages") == ["tea.html"]
        assert "Would more examples help?" in (tmp_path / "pages" / "tea.html").read_text(encoding="utf-8")
        code, out, _ = train(template=None)
        assert code == 0 and f"{tmp_path / 'out' / 'report.html'}" in out
        assert (tmp_path / "out" / "report.html").is_file()

    @pytest.mark.parametrize(
        "options, said",
        [
            ({"report": "page.txt"}, "ends in .html"),
            ({"report": "page.html", "seeds": "0,1"}, "Expected one adapter for a report"),
            ({"learning_curve": "4,x"}, "Expected --learning-curve as different numbers"),
            ({"learning_curve": "16"}, "fewer than all 32 examples, found 16; take other numbers for --learning-curve"),
            ({"learning_curve": "4", "test_rows": "0", "test_data": None, "examples_per_label": "0"}, "test rows"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_reports_and_curves_that_cannot_be(self, train, tmp_path, options, said):
        code, _, err = train(**options)
        assert code == 2 and said in err.splitlines()[-1] and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("option", "value"), [("--steps", 5), ("--learning-rates", "0.01,0.02")])
    def test_a_head_alone_trains_no_vectors_by_any_setting(self, train, tmp_path, option, value):
        code, _, err = train("--opinions", "head", option, value, steps=None)
        assert code == 2 and f"found 'head' alone, which trains none; leave out {option}." in err
        assert not (tmp_path / "out").exists()

    def test_a_head_alone_is_said_to_train_no_vectors(self, train):
        code, out, err = train("--opinions", "head", steps=None)
        assert code == 0, err
        assert "No vectors were trained; adapter of" in out

    def test_peft_reads_it(self, place):
        base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
        model = peft.PeftModel.from_pretrained(base, place / "for-peft").eval()
        task, rows = Task.from_file(place / "for-peft" / "task.yaml"), read_rows(place / "test.csv")
        found = [prediction.label for prediction in predict(model, words.tokenizer(), task, rows)]
        metrics = json.loads((place / "for-peft" / "metrics.json").read_text())
        assert task.metrics([row["label"] for row in rows], found) == metrics["trained"]

    def test_what_acts_from_the_question_on_is_neither_merged_nor_pefts(self, ia3, place, tmp_path):
        config = json.loads((place / "adapter" / "adapter_config.json").read_text())
        assert config["acts_from"] == "question" and config["peft_type"] != "IA3"
        code, _, err = ia3("merge", place / "adapter", "--output", tmp_path / "merged")
        assert code == 2 and "merged weights would act on the text too" in err and not (tmp_path / "merged").exists()

    def test_a_template_that_ends_in_its_text_is_read_from_the_start(self, train, tmp_path):
        ending = "what is this ? {{ text }}"
        assert train("--acts-from", "auto", template=ending)[0] == 0
        assert "acts_from" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        code, _, err = train("--acts-from", "question", template=ending, output=tmp_path / "other")
        assert code == 2 and "Expected a text that can be read before the question" in err

    def test_memory_for_what_is_read_once(self, train):
        assert train(memory="3kB")[0] == 0
        code, _, err = train(memory="much")
        assert code == 2 and "memory" in err

    def test_prints_a_table_or_json(self, train):
        code, out, _ = train()
        assert code == 0
        for text in ("zero-shot", "trained", "majority class", "macro-F1", "160 trained", words.TEMPLATE):
            assert text in out
        code, out, err = train("--json")
        assert json.loads(out)["trained"]["accuracy"] >= 0
        assert "Training" in err

    def test_same_seed_same_adapter_other_seed_other(self, train, tmp_path):
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            assert train(output=tmp_path / name, seed=seed)[0] == 0
        a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
        assert a == b != c

    def test_a_base_in_bfloat16(self, train, ia3, tmp_path):
        assert train(dtype="bfloat16")[0] == 0
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert "bfloat16" not in str(config)  # the adapter is for weights of any kind
        found = {}
        for dtype in ("auto", "bfloat16"):
            code, out, err = ia3("predict", tmp_path / "out", "the soup was lovely", "--json", dtype=dtype)
            assert code == 0, err
            found[dtype] = json.loads(out)[0]["probabilities"]["pos"]
        assert found["auto"] != found["bfloat16"] == pytest.approx(found["auto"], abs=0.02)
        assert "Expected a dtype of 'auto'" in train(dtype="half")[2]

    def test_a_wording_is_chosen_shown_and_stored(self, train, tmp_path):
        code, out, _ = train(template=None, choices=None)
        prompt = Task.load(tmp_path / "out" / "task.yaml").templates[0].prompt
        assert (
            code == 0
            and prompt.startswith("{{ text }}\n")
            and prompt in [one.prompt for one in Task.infer(words.rows(4)).candidates]
        )
        assert "the best of" in out and prompt.splitlines()[-1] in out

    def test_from_a_task_file_with_the_rest_as_test_rows(self, ia3, place, tmp_path):
        task = Task(template=words.TEMPLATE, choices={"pos": "good", "neg": "bad"}, name="teas", train="train.csv")
        task.save(tmp_path / "task.yaml")
        words.write_csv(tmp_path / "train.csv", words.different(60))
        code, out, err = ia3(
            "train",
            "-m",
            place / "model",
            "--task",
            tmp_path / "task.yaml",
            "--steps",
            1,
            "-o",
            tmp_path / "out",
            "--json",
        )
        assert code == 0 and json.loads(out)["test_rows"] == 60 - 32 and json.loads(out)["task"] == "teas"
        assert "duplicate" not in err

    def test_given_test_rows_in_the_words_of_examples_stay_and_are_counted(self, train, tmp_path):
        examples = words.different(32)
        rows = [*examples[:3], {"text": "the tea was fresh", "label": "pos"}]
        data, test = (words.write_csv(tmp_path / name, some) for name, some in (("a.csv", examples), ("b.csv", rows)))
        code, out, _ = train(data=data, test_data=test)
        assert code == 0 and "3 test rows duplicate training examples." in out and "4 test rows" in out
        assert len(json.loads((tmp_path / "out" / "metrics.json").read_text())["train_rows"]) == 32
        assert "train_rows" not in train("--json", data=data, test_data=test)[1]

    def test_interrupted_and_resumed_ends_as_uninterrupted(self, train, tmp_path, monkeypatch):
        from ia3 import TFewTrainer

        assert train(steps=8, output=tmp_path / "whole")[0] == 0
        step = TFewTrainer.training_step

        def interrupted(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(TFewTrainer, "training_step", interrupted)
        code, _, err = train(steps=8, output=tmp_path / "cut")
        assert code == 130 and "checkpoint-4 with the same command and --resume" in err
        monkeypatch.setattr(TFewTrainer, "training_step", step)
        code, _, err = train("--resume", steps=9, output=tmp_path / "cut")
        assert code == 2 and "'recipe'" in err
        settings = tmp_path / "cut" / "checkpoints" / "run.json"
        text = settings.read_text()
        for damage in ("[]", "null"):
            settings.write_text(damage)
            code, _, err = train("--resume", steps=8, output=tmp_path / "cut")
            assert code == 2 and "Expected the interrupted run's settings in" in err and err.count("\n") == 1
        settings.write_text(text)
        code, out, _ = train("--resume", steps=8, output=tmp_path / "cut")
        assert code == 0 and "Going on from" in out
        a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
        assert a == b
        assert not (tmp_path / "cut" / "checkpoints").exists()

    def test_an_interrupted_search_or_measurement_says_so(self, train, monkeypatch):
        def interrupted(self):
            raise KeyboardInterrupt

        monkeypatch.setattr(Running, "zero_shot", interrupted)
        code, _, err = train()
        assert code == 130 and err == "ia3: interrupted.\n"

    def test_several_text_columns(self, train, tmp_path):
        rows = [{"title": row["text"], "body": row["text"], "label": row["label"]} for row in words.rows(24, seed=3)]
        words.write_csv(tmp_path / "two.csv", rows)
        given = {"data": tmp_path / "two.csv", "test_data": None, "template": None, "choices": None}
        code, _, err = train(**given, text_column="body, title")
        assert code == 0, err
        columns = AdapterFolder(tmp_path / "out").required_task().columns
        assert sorted(columns) == ["body", "title"]
        code, _, err = train(**given, text_column="body,name")
        assert code == 2 and "Expected a column 'name', found the columns 'title', 'body', 'label'" in err

    @pytest.mark.parametrize(
        ("name", "data", "options", "message"),
        [
            ("t.txt", "text\tlabel\n", {}, "give a table's file one of these endings"),
            ("t.txt", "text\tlabel\n", {"delimiter": "tab"}, "Expected a .csv or .tsv file with a delimiter"),
            ("t.csv", "text,label\nna\xefve,pos\n", {}, "; save the file as UTF-8."),
        ],
    )
    def test_files_that_are_no_table_are_told_what_to_become(self, train, tmp_path, name, data, options, message):
        (tmp_path / name).write_bytes(data.encode("latin-1"))
        code, _, err = train(data=tmp_path / name, test_data=None, **options)
        assert code == 2 and message in err and "leave out" not in err and err.count("\n") == 1

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"data": "nowhere.csv"}, "found no 'nowhere.csv'"),
            ({"model": "./nowhere"}, "no './nowhere' here"),
            ({"task": "nowhere.yaml", "data": None}, "found no 'nowhere.yaml'"),
            ({"label_column": "kind"}, "column 'kind', found the columns 'text', 'label'; see --label-column"),
            (
                {"text_column": "review", "template": None},
                "column 'review', found the columns 'text', 'label'; see --text-column",
            ),
            ({"template": "{{ review }}"}, "names 'review', but the columns are 'text', 'label'"),
            ({"template": "{{ text"}, "Jinja"),
            ({"template": "{{ text }} {{ label }}"}, "without the label column 'label', which gives the answer away"),
            ({"text_column": "label", "template": None}, "two columns for text and label, found 'label' for both"),
            ({"choices": "pos=good"}, "Expected --choices with all labels, label=text,label=text, found one, 'pos'"),
            ({"template": "about"}, "found the same for all 60; let the template name a column"),
            ({"choices": "pos=good,pos=bad"}, "different labels"),
            ({"choices": "pos=good,bad=bad"}, "found 'neg' (row 2)"),
            (
                {"examples_per_label": 40},
                "found fewer for 2 of 2 labels, the fewest for 'neg': 30; ask for fewer, or take what there is, without --examples-per-label",
            ),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, train, tmp_path, changes, message):
        code, _, err = train(**changes)
        assert code == 2
        assert err.startswith("ia3: ") and err.count("\n") == 1 and message in err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "fields, labels, message",
        [
            ("", ["l1", "l2"], "expected choices, or each template's own, found none for template 1"),
            ("choices: [l1, l2]", ["l1", "l2", "l3"], "found 'l3' (row 3); there are 'l1', 'l2'"),
            (
                f"choices: [{', '.join(f'l{i}' for i in range(76))}]",
                [f"l{i}" for i in range(77)],
                "found 'l76' (row 77)",
            ),
            ("choices:\n- l1: good\n- l2: bad", ["l1", "l2"], "without dashes"),
            (
                "choices: {l1: heavenly, l2: dreadful}",
                ["l1", "l2"],
                "'heavenly' and 'dreadful' are the same to this model",
            ),
            (
                "choices: {l1: good, l2: bad}",
                ["l1", "l2"],
                "Expected prompts of at most 2047 tokens, found 3001 (row 1)",
            ),
            ("choices: {l1: good, l2: bad}", ["l1", "l2", None], "Expected a label, found none (row 3)"),
        ],
    )
    def test_tasks_that_do_not_fit_their_rows_or_the_model(self, ia3, place, tmp_path, fields, labels, message):
        text = "tea " * (3000 if "at most" in message else 1)
        rows = [json.dumps({"text": text + str(number), "label": label}) for number, label in enumerate(labels)]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        (tmp_path / "task.yaml").write_text(f"template: '{{{{ text }}}}'\ntrain: rows.jsonl\n{fields}\n")
        (tmp_path / "recipe.yaml").write_text("long_prompts: refuse\nsteps: 1\n")
        options = {"task": tmp_path / "task.yaml", "recipe": tmp_path / "recipe.yaml", "output": tmp_path / "out"}
        code, _, err = ia3("train", model=place / "model", examples_per_label=0, **options)
        assert code == 2 and message in err and err.startswith("ia3: ") and err.count("\n") == 1
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "rows, message",
        [
            ([{"text": "tea", "label": "maybe"}], "found 'maybe' (row 1)"),
            ([{"text": "tea", "label": "pos"}, {"text": "", "label": "pos"}], "found it empty (row 2)"),
            ([{"review": "tea", "label": "pos"}], "names 'text'"),
            ([{"text": "tea", "kind": "pos"}], "label column 'label'"),
        ],
    )
    def test_bad_test_rows_are_found_before_training(self, train, tmp_path, rows, message):
        code, _, err = train(test_data=words.write_csv(tmp_path / "bad.csv", rows))
        assert code == 2 and message in err and not (tmp_path / "out").exists()

    def test_a_base_model_cut_short(self, train, place, tmp_path):
        shutil.copytree(place / "model", tmp_path / "model")
        weights = (tmp_path / "model" / "model.safetensors").read_bytes()
        (tmp_path / "model" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        code, _, err = train(model=tmp_path / "model")
        assert code == 2 and "Cannot load" in err and err.count("\n") == 1

    def test_one_class_only(self, train, tmp_path):
        path = words.write_csv(tmp_path / "one.csv", [{"text": f"tea {i}", "label": "pos"} for i in range(40)])
        code, _, err = train(data=path, choices=None)
        assert code == 2 and "at least two labels in column 'label', found 'pos'" in err

    def test_interrupted_before_a_checkpoint_says_so(self, train, tmp_path, monkeypatch):
        from ia3 import TFewTrainer

        def interrupted(self, *args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(TFewTrainer, "training_step", interrupted)
        code, _, err = train()
        assert code == 130 and "no checkpoint yet" in err
        assert not (tmp_path / "out" / "adapter_model.safetensors").exists()

    def test_interrupted_after_training_leaves_the_earlier_adapter_whole(self, train, tmp_path, monkeypatch):
        import ia3.evaluation.prediction

        assert train()[0] == 0
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        calls, real = [], ia3.evaluation.prediction.predict

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(ia3.evaluation.prediction, "predict", interrupted)
        assert train(choices="pos=bad,neg=good")[0] == 130
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before

    def test_other_rows_are_not_resumed_on(self, train, place, tmp_path, monkeypatch):
        from ia3 import TFewTrainer

        step = TFewTrainer.training_step

        def interrupted(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        data = words.write_csv(tmp_path / "rows.csv", words.rows(60, seed=1))
        monkeypatch.setattr(TFewTrainer, "training_step", interrupted)
        assert train(data=data)[0] == 130
        words.write_csv(data, words.rows(60, seed=2))
        code, _, err = train("--resume", data=data)
        assert code == 2 and "'examples'" in err

    def test_row_numbers_in_errors_are_the_files(self, train, tmp_path):
        rows = words.rows(60)
        rows[30]["text"] = ""
        code, _, err = train(data=words.write_csv(tmp_path / "rows.csv", rows))
        assert code == 2 and "(row 31)" in err

    def test_a_full_disk_leaves_the_earlier_adapter(self, train, tmp_path):
        """A real limit on the size of files."""
        assert train()[0] == 0
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (2000, limits[1])
        )  # what is beyond is an error: Python ignores SIGXFSZ
        try:
            code, _, err = train(seed=5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 2
        last = err.strip().splitlines()[-1]
        assert last.startswith("ia3: ") and "whole" in last and "Traceback" not in err
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


class TestPredict:
    def test_texts(self, ia3, place):
        code, out, _ = ia3("predict", place / "adapter", "the tea was lovely", "the soup was stale", "--json")
        found = json.loads(out)
        assert code == 0 and len(found) == 2
        assert all(sum(item["probabilities"].values()) == pytest.approx(1) for item in found)
        code, out, _ = ia3("predict", place / "adapter", "the tea was lovely")
        assert code == 0 and "the tea was lovely" in out and "%" in out

    def test_its_own_output_can_be_predicted_again(self, ia3, place, tmp_path):
        for source, name in ((place / "test.csv", "a.csv"), (tmp_path / "a.csv", "b.csv")):
            assert ia3("predict", place / "adapter", "--data", source, "--output", tmp_path / name)[0] == 0
        assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()

    def test_lists_in_its_output_can_be_read_again(self, ia3, place, tmp_path):
        """Answers of a row as JSON, as tasks read them from a CSV file."""
        shutil.copytree(place / "adapter", tmp_path / "adapter")
        Task(template="{{ text }}", choices="{{ endings }}").save(tmp_path / "adapter" / "task.yaml")
        rows = [
            {"text": "the tea was", "endings": endings} for endings in (["good", "bad"], ["good", "not good", "fine"])
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for source, name in (("rows.jsonl", "a.csv"), ("a.csv", "b.csv")):
            options = {"data": tmp_path / source, "output": tmp_path / name}
            code, _, err = ia3("predict", tmp_path / "adapter", **options)
            assert code == 0, err
        assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
        assert json.loads(read_rows(tmp_path / "b.csv")[1]["endings"]) == rows[1]["endings"]

    def test_class_labels_are_numbers_where_the_task_wants_them(self, ia3, place, tmp_path):
        """As in training and evaluation: published templates take them for places."""
        shutil.copytree(place / "adapter", tmp_path / "adapter")
        made = Task(template="{{ ['tea', 'soup'][kind] }} {{ text }}", choices=["good", "bad"], class_names=False)
        made.save(tmp_path / "adapter" / "task.yaml")
        (tmp_path / "adapter" / "opinions.json").unlink()  # they know the labels of the old task
        features = datasets.Features(
            {"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["drink", "meal"])}
        )
        rows = datasets.Dataset.from_dict({"text": ["was good"], "kind": [1]}, features=features)
        rows.save_to_disk(tmp_path / "rows")
        code, _, err = ia3("predict", tmp_path / "adapter", "--json", data=tmp_path / "rows")
        assert code == 0, err

    @pytest.mark.parametrize("name", ["found.csv", "found.jsonl"])
    def test_rows_of_a_file(self, ia3, place, tmp_path, name):
        code, _, _ = ia3("predict", place / "adapter", "--data", place / "test.csv", "--output", tmp_path / name)
        rows = read_rows(tmp_path / name)
        assert code == 0 and len(rows) == 30
        _, out, _ = ia3("predict", place / "adapter", "--data", place / "test.csv", "--json")
        assert [row["prediction"] for row in rows] == [item["label"] for item in json.loads(out)]
        assert rows[0]["text"] == read_rows(place / "test.csv")[0]["text"]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ([], "texts or --data"),
            (["tea", "--data", "x.csv"], "one of the two"),
            (["tea", "--output", "found.txt"], ".csv or .jsonl"),
            ([" "], "found it empty (row 1)"),
            (["--data", "nowhere.csv"], "found no 'nowhere.csv'"),
            (["tea", "--model", "./nowhere"], "no './nowhere' here"),
        ],
    )
    def test_bad_input(self, ia3, place, arguments, message):
        code, _, err = ia3("predict", place / "adapter", *arguments)
        assert code == 2 and message in err and err.count("\n") == 1


class TestAdapterFolders:
    """Folders that are not, or not any more, what they should be: every command says so in a line."""

    @pytest.fixture
    def adapter(self, place, tmp_path):
        return shutil.copytree(place / "adapter", tmp_path / "adapter")

    def fails(self, ia3, adapter, message):
        for command in (["predict", adapter, "tea"], ["merge", adapter, "--output", adapter.parent / "merged"]):
            code, _, err = ia3(*command)
            assert code == 2 and message in err and err.count("\n") == 1, err
        assert not (adapter.parent / "merged").exists()

    def test_of_another_model(self, ia3, adapter, tmp_path):
        tiny.build("llama", vocab_size=len(words.VOCABULARY), intermediate_size=64).save_pretrained(tmp_path / "other")
        words.tokenizer().save_pretrained(tmp_path / "other")
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": str(tmp_path / "other")})
        )
        self.fails(ia3, adapter, "other shapes than this model")

    def test_of_another_method(self, ia3, adapter):
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
        self.fails(ia3, adapter, "peft_type 'LORA'")

    def test_cut_short(self, ia3, adapter):
        whole = (adapter / "adapter_model.safetensors").read_bytes()
        (adapter / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
        self.fails(ia3, adapter, "whole safetensors file")

    def test_without_config(self, ia3, adapter):
        (adapter / "adapter_config.json").unlink()
        self.fails(ia3, adapter, "adapter_config.json")

    def test_without_a_task(self, ia3, adapter):
        (adapter / "task.yaml").unlink()
        code, _, err = ia3("predict", adapter, "tea")
        assert code == 2 and "task.yaml" in err and err.count("\n") == 1

    def test_on_the_hub_is_used_with_its_recipe_and_its_temperature(self, ia3, adapter, monkeypatch):
        import huggingface_hub

        from ia3 import Recipe
        from ia3.evaluation.calibration import Calibration
        from ia3.folder import AdapterFolder

        quality = dict.fromkeys(("log_loss", "log_loss_before", "calibration_error", "calibration_error_before"), 0.1)
        Recipe(length_normalization=0.0).save(adapter / "recipe.yaml")
        AdapterFolder(adapter).calibrate(Calibration(temperature=3.0, rows=9, **quality))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, filename, **kw: str(adapter / filename))
        here, there = (ia3("predict", where, "tea not good", "--json") for where in (adapter, "owner/name"))
        assert here[0] == there[0] == 0 and here[1] == there[1]
        (adapter / "calibration.json").unlink()
        assert ia3("predict", adapter, "tea not good", "--json")[1] != there[1]

    def test_with_a_damaged_recipe_beside_it(self, ia3, adapter):
        (adapter / "recipe.yaml").write_text("steps: many")
        code, _, err = ia3("predict", adapter, "tea")
        assert code == 2 and "recipe.yaml" in err and err.count("\n") == 1

    def test_without_a_base_model(self, ia3, adapter):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
        self.fails(ia3, adapter, "--model")

    def test_mistyped_beside_others_name_them_and_ask_no_hub(self, ia3, place, monkeypatch):
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
        self.fails(
            ia3,
            place / "adaptr",
            f"Can't find the folder 'adaptr' in '{place}'; there are 'adapter', 'for-peft', 'model'",
        )

    def test_that_are_not_there(self, ia3, tmp_path):
        self.fails(ia3, tmp_path / "nowhere", "nowhere")


def test_evaluate_agrees_with_training(ia3, place):
    code, out, _ = ia3("evaluate", place / "adapter", "--data", place / "test.csv", "--json")
    metrics = json.loads((place / "adapter" / "metrics.json").read_text())
    found = json.loads(out)
    assert code == 0 and {key: found[key] for key in ("accuracy", "macro_f1")} == metrics["trained"]
    assert found["labels"]["pos"]["rows"] == 15 and found["majority"]["accuracy"] == 0.5
    code, out, _ = ia3("evaluate", place / "adapter", "--data", place / "test.csv")
    assert code == 0 and "precision" in out
    code, _, err = ia3("evaluate", place / "adapter")
    assert code == 2 and "--data" in err


def test_merged_folder_is_a_plain_model_that_predicts_the_same(ia3, place, tmp_path):
    code, out, _ = ia3("merge", place / "for-peft", "--output", tmp_path / "merged", "--json")
    assert code == 0 and json.loads(out)["model_class"] == "LlamaForCausalLM"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    task, rows = Task.from_file(tmp_path / "merged" / "task.yaml"), read_rows(place / "test.csv")
    _, out, _ = ia3("predict", place / "for-peft", "--data", place / "test.csv", "--json")
    assert [p.label for p in predict(model, tokenizer, task, rows)] == [item["label"] for item in json.loads(out)]
    code, _, err = ia3("merge", place / "for-peft", "--output", tmp_path / "merged")
    assert code == 2 and "new or empty folder" in err


def test_a_merged_model_is_not_put_where_no_folder_can_be_renamed_to(ia3, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = ia3("merge", place / "for-peft", "--output", ".")
    assert code == 2 and "mount point or the current folder" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    assert ia3("merge", place / "for-peft", "--output", "empty")[0] == 0


def test_inspect(ia3, place):
    code, out, _ = ia3("inspect", place / "adapter", "--json", "--top", 2)
    found = json.loads(out)
    assert code == 0 and found["parameters"] == 160 and found["base_model"] == str(place / "model")
    sides = {row["kind"].rpartition(".")[2]: (row["side"], row["modules"], row["numbers"]) for row in found["kinds"]}
    assert sides == {"k_proj": ("output", 2, 32), "v_proj": ("output", 2, 32), "down_proj": ("input", 2, 96)}
    assert len(found["largest"]) == len(found["smallest"]) == 2
    assert found["largest"][0]["scale"] == max(layer["max"] for layer in found["layers"].values())
    assert found["smallest"][0]["scale"] == min(layer["min"] for layer in found["layers"].values())
    code, out, _ = ia3("inspect", place / "adapter")
    assert code == 0 and "160 numbers" in out and "down_proj" in out


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("base_model.model.k.ia3_l", torch.ones(0, 1), "Expected a vector, found 'base_model.model.k.ia3_l' of shape (0, 1)"),
        ("base_model.model.k.ia3_l", torch.tensor(1.0), "of shape ()"),
        ("base_model.model.k.ia3_l", torch.ones(2, 2), "of shape (2, 2)"),
        ("base_model.model.k.ia3_l", torch.ones(4, 1).int(), "torch.int32 in 'k'"),
        ("base_model.model.k.ia3_l", torch.full((4, 1), torch.nan), "NaN or infinite values in 'k'"),
        ("k.ia3_l", torch.ones(4, 1), None),
        ("[/k].ia3_l", torch.ones(4, 1), None),
        ("x" * 5000 + ".ia3_l", torch.ones(0), "Expected a vector, found 'xxx"),
    ],
    ids=range(8),
)  # fmt: skip
def test_inspect_other_tensors(ia3, tmp_path, name, tensor, said):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    save_file({name: tensor}, tmp_path / "adapter_model.safetensors")
    for arguments in ([], ["--json"]):
        code, out, err = ia3("inspect", tmp_path, *arguments)
        if said is None:
            assert code == 0 and name.removesuffix(".ia3_l").rpartition(".")[2] in out and not err
        else:
            assert (code, out, err.count("\n")) == (2, "", 1) and said in err and len(err) < 300 + len(str(tmp_path))


def test_convert(ia3, tmp_path):
    layers = "encoder.block.0.layer"
    vectors = {f"{layers}.0.SelfAttention.k.multi_lora_b": 4, f"{layers}.1.DenseReluDense.wi_1.multi_lora_b": 6}
    torch.save({name: torch.full((size, 1), 0.5) for name, size in vectors.items()}, tmp_path / "finish.pt")
    arguments = ("convert", tmp_path / "finish.pt", "--base", "bigscience/T0_3B", "--output")
    code, out, err = ia3(*arguments, tmp_path / "a", "--json")
    size = sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    assert code == 0 and not err
    assert json.loads(out) == {
        "output": str(tmp_path / "a"),
        "source": "T-Few",
        "base_model": "bigscience/T0_3B",
        "target_modules": ["DenseReluDense.wo", "SelfAttention.k"],
        "feedforward_modules": ["DenseReluDense.wo"],
        "parameters": 10,
        "bytes": size,
        "notes": [],
    }
    code, out, _ = ia3(*arguments, tmp_path / "b")
    assert code == 0 and "T-Few adapter of 10 numbers in 2 tensors" in out
    assert json.loads(ia3("inspect", tmp_path / "b", "--json")[1])["parameters"] == 10
    code, out, _ = ia3("convert", tmp_path / "finish.pt", "--output", tmp_path / "c")
    assert code == 0 and "names no base model" in out


def test_what_cannot_be_converted_is_refused_in_one_line(ia3, tmp_path):
    torch.save({"model.layers.0.self_attn.q_proj.lora_A": torch.ones(4, 2)}, tmp_path / "lora.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    for name, said in (
        ("lora.pt", "q_proj.lora_A"),
        ("text.pt", "flat dictionary of tensors"),
        ("none.pt", "Can't find"),
    ):
        code, out, err = ia3("convert", tmp_path / name, "--output", tmp_path / "out", "--json")
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err
        assert not (tmp_path / "out").exists()


def test_help_loads_neither_torch_nor_transformers():
    script = "import sys; from ia3.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\nprint({'torch', 'transformers', 'sklearn', 'datasets'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=True
    )
    assert done.stdout.strip().endswith("set()")
    assert "--examples-per-label" in done.stdout


def test_version_and_unknown_commands(ia3):
    assert ia3("--version")[1].startswith("ia3 0.")
    assert ia3("trian")[0] == 2


class TestDeviceMap:
    def test_auto_answers_as_without(self, ia3, train, place):
        code, out, _ = train("--json", device_map="auto", steps=2)
        assert code == 0 and json.loads(out)["trained"]
        said = [ia3("predict", place / "adapter", "the tea was lovely", "--json", *more)[1] for more in ([], AUTO)]
        assert json.loads(said[0]) == json.loads(said[1])
        measured = [
            ia3("evaluate", place / "adapter", "--data", place / "test.csv", "--json", *more)[1] for more in ([], AUTO)
        ]
        assert json.loads(measured[0]) == json.loads(measured[1])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"device_map": "atuo"}, "Expected a device_map of 'auto', 'shards', found 'atuo'; close to it: 'auto'."),
            ({"device_map": "shards"}, "Expected several processes for the device_map 'shards', found WORLD_SIZE=1"),
            ({"device_map": "auto", "model": "auto"}, "Expected one model, found several; leave out --device-map."),
        ],
    )
    def test_what_it_cannot_be(self, train, changes, message):
        code, _, err = train(**changes)
        assert code == 2 and message in err and err.count("\n") == 1, err


AUTO = ["--device-map", "auto"]
