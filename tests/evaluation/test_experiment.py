"""Experiments from Python: what the commands run, without the command line."""

import json

import pandas as pd
import pytest

from ia3 import Experiment, InputError, Recipe, Task, TFewTrainer
from ia3.adapter.stored import StoredAdapter
from ia3.cli import main
from ia3.evaluation.checkpoints import Interrupted, settings_of
from ia3.evaluation.comparison import Comparison
from ia3.evaluation.experiment import require_page
from ia3.evaluation.pretraining import Pretraining
from ia3.evaluation.progress import Progress, Stage
from ia3.evaluation.raft import Raft
from ia3.evaluation.results import majority, majority_metrics
from ia3.task.raft import RaftTask
from support import tiny, words

RECIPE = Recipe.small().changed(steps=8)
VECTORS = "adapter_model.safetensors"


class Told(Progress):
    """Keeps what it was told."""

    def __init__(self):
        self.stages, self.said, self.headings, self.waited = {}, [], [], []

    def heading(self, text):
        self.headings.append(text)

    def say(self, text):
        self.said.append(text)

    def waiting(self, text):
        self.waited.append(text)
        return super().waiting(text)

    def stage(self, title, total, done=0):
        self.stages[title] = made = ToldStage(total, done)
        return made


class ToldStage(Stage):
    def __init__(self, total, done):
        self.total, self.done, self.text, self.ended = total, done, "", False

    def advance(self, count):
        self.done += count

    def reach(self, done):
        self.done = done

    def note(self, text):
        self.text = text

    def end(self):
        self.ended = True


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, rows, and a task that names them."""
    folder = tmp_path_factory.mktemp("place")
    words.save_model(folder / "model")
    for name, rows in (("train", words.different(40)), ("test", words.rows(24, seed=1))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"template": "review : {{ text }} answer :", "train": "train.jsonl", "test": "test.jsonl"}
    Task(name="teas", choices={"pos": "good", "neg": "not good"}, **fields).save(folder / "teas.yaml")
    return folder


@pytest.fixture
def task(place):
    return Task.load(place / "teas.yaml")


def experiment(place, task, folder, **fields):
    fields = {"model": str(place / "model"), "recipe": RECIPE, "examples_per_label": 8, **fields}
    return Experiment(task, folder=folder, **fields)


def test_it_is_what_the_command_runs(place, task, tmp_path, capsys):
    told = Told()
    outcome = experiment(place, task, tmp_path / "ours", folds=2, seed=3).run(told)
    options = ["--model", place / "model", "--task", place / "teas.yaml", "--output", tmp_path / "train"]
    options += ["--steps", 8, "--examples-per-label", 8, "--folds", 2, "--seed", 3]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--json", *map(str, options)])
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out)
    names = sorted(path.name for path in (tmp_path / "train").iterdir())
    assert sorted(path.name for path in outcome.folder.iterdir()) == names
    for name in (
        VECTORS,
        "task.yaml",
        "recipe.yaml",
        "calibration.json",
        "opinions.json",
        "head.safetensors",
        "adapter_config.json",
    ):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "train" / name).read_bytes()
    for results in (printed, ours := dict(outcome.results)):
        results.pop("train_seconds")
    assert printed == {"output": str(tmp_path / "train"), **ours}
    titles = {
        "Zero-shot": 24,
        "Balancing": 16,
        "Training": 8,
        "Trained": 24,
        "Head": 16,
        "Cross-validation": 8,
        "Head, test rows": 24,
    }
    assert {title: stage.total for title, stage in told.stages.items()} == titles
    assert all(stage.done == stage.total or stage.ended for stage in told.stages.values())
    assert told.stages["Trained"].text.startswith("accuracy ")  # of vectors that are not balanced yet
    assert told.stages["Head, test rows"].text == f"accuracy {ours['trained']['accuracy']:.1%}"
    assert "loss" in told.stages["Training"].text and told.waited == ["Loading the model …"]


def test_an_adapter_of_another_task_is_not_replaced_in_silence(place, task, tmp_path):
    run = experiment(place, task, tmp_path / "ours", recipe=RECIPE.changed(steps=1))
    for choices, expected in (({"pos": "a", "neg": "b"}, 0), ({"tea": "a", "soup": "b"}, 1)):
        (tmp_path / "ours").mkdir(exist_ok=True)
        Task(name="foods", template="{{ text }}", choices=choices).save(tmp_path / "ours" / "task.yaml")
        told = Told()
        run.run(told)
        assert (
            len([text for text in told.said if "an adapter of another task, 'foods'; it is replaced" in text])
            == expected
        )


def test_several_of_each(place, task, tmp_path):
    """Tasks with rows of their own, one of them without test rows, seeds and learning rates."""
    soups = Task(name="soups", template="{{ text }}", choices={"pos": "fine", "neg": "bad"})
    outcome = experiment(
        place,
        [task, soups],
        tmp_path,
        rows=[None, pd.DataFrame(words.different(20))],
        test=[words.rows(6), None],
        recipe=RECIPE.changed(steps=1),
        seed=(0, 1),
        learning_rate=[0.01],
        test_rows=5,
        examples_per_label=4,
    ).run()
    assert list(outcome.results["members"]) == [
        f"{name}/seed-{seed}-lr-0.01" for name in ("teas", "soups") for seed in (0, 1)
    ]
    assert list(outcome.results["summary"]) == ["teas/lr-0.01", "soups/lr-0.01"]
    for name, results in outcome.trials.items():
        assert StoredAdapter(tmp_path / name).metrics["test_rows"] == results["test_rows"] == 5
    assert json.loads((tmp_path / "metrics.json").read_text()) == outcome.results
    assert not (tmp_path / "checkpoints").exists()


def test_interrupted_and_resumed_ends_as_uninterrupted(place, task, tmp_path, monkeypatch):
    experiment(place, task, tmp_path / "whole").run()
    step = TFewTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as error:
        patch.setattr(TFewTrainer, "training_step", interrupted)
        experiment(place, task, tmp_path / "cut").run()
    assert error.value.checkpoint == str(tmp_path / "cut" / "checkpoints" / "checkpoint-4")
    with pytest.raises(InputError, match="another 'examples_per_label', 'seed', 'examples'"):
        experiment(place, task, tmp_path / "cut", seed=1, examples_per_label=0).run(resume=True)
    experiment(place, task, tmp_path / "cut").run(resume=True)
    assert (tmp_path / "whole" / VECTORS).read_bytes() == (tmp_path / "cut" / VECTORS).read_bytes()
    with pytest.raises(InputError, match="found none"):
        experiment(place, task, tmp_path / "cut").run(resume=True)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"folds": 100}, "Expected from 2 folds"),
        ({"recipe": RECIPE.changed(init="/no/adapter")}, "/no/adapter"),
        ({"examples_per_label": 100}, "Expected 100 training examples for each label"),
        ({"folder": "file"}, "Expected a folder for the results, found the file"),
        ({"rows": [{"text": "tea"}]}, "Expected a label column 'label'"),
    ],
)
def test_what_cannot_be_run_is_said_before_a_model_is_loaded(place, task, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr("ia3.adapter.pretrained.load_base", lambda *args: pytest.fail("loaded a model"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message) as error:
        experiment(place, task, **{"folder": "out", **fields}).run()
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_tasks_and_rows_that_do_not_go_together(place, task, tmp_path):
    other = task.model_copy(update={"name": "other"})
    for tasks, rows, message in (
        ([task, task], None, "different names that can name folders, found 'teas', 'teas'"),
        ([task, other.model_copy(update={"name": "a/b"})], None, "found 'a/b'"),
        ([], None, "found none"),
        ([task, other], [words.rows(8)], "rows and test rows of each of 2 tasks, found 1 and 2"),
    ):
        with pytest.raises(InputError, match=message):
            experiment(place, tasks, tmp_path, rows=rows).run()
    with pytest.raises(InputError, match="Expected training rows for 'bare'"):
        experiment(place, Task(name="bare", template="{{ text }}", choices=["a", "b"]), tmp_path).run()


def test_settings_tell_runs_apart():
    rows = words.rows(4)
    one, same, other = (settings_of(model="m", members={"a": {"rows": its}}) for its in (rows, list(rows), rows[1:]))
    assert one == same != other and one == json.loads(json.dumps(one))
    assert settings_of(recipe=RECIPE, seed=0) == {"recipe": RECIPE.model_dump(), "seed": 0}


def test_where_a_report_cannot_be(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label")
    for file, expected in {"x.txt": "ends in .html", "rows.csv/x.html": "in a folder that can be written to"}.items():
        with pytest.raises(InputError, match=expected):
            require_page(tmp_path / file)
    require_page(tmp_path / "new" / "x.html")


def test_the_majority(task):
    assert majority(["neg", "pos", "pos"]) == "pos" and majority(["neg", "pos"]) == "neg"
    assert majority_metrics(task, ["neg", "pos", "pos", "pos"])["accuracy"] == 0.75


def test_a_comparison(place, task, tmp_path):
    from ia3 import load_base

    base, tokenizer = load_base(str(place / "model"))
    comparison = Comparison(base, tokenizer, task, words.rows(16), words.rows(6, seed=1), RECIPE.changed(steps=1))
    told = Told()
    rows = comparison.run(comparison.shots([2]), told)
    assert [row["method"] for row in rows] == ["zero-shot", "2-shot", "t-few"]
    stages = ["zero-shot", "zero-shot, balancing", "2-shot", "2-shot, balancing", "training", "t-few"]
    assert list(told.stages) == stages
    comparison.save(tmp_path, rows)
    assert json.loads((tmp_path / "compare.json").read_text())["rows"] == rows


def test_pretraining(place, task, tmp_path):
    told = Told()
    rows = words.rows(8)
    found = Pretraining([(task, rows)], tmp_path, str(place / "model"), recipe=Recipe(steps=3)).run(told)
    assert StoredAdapter(tmp_path).metrics == found and found["tasks"]["teas"]["rows"] == 8
    assert told.said == ["100.0% teas"] and told.stages["Pre-training"].done == 3
    assert "learned by heart" not in told.stages["Pre-training"].text


def test_raft(place, tmp_path):
    task = Task(name="teas", template="{{ text }}", choices={"pos": "good", "neg": "not good"})
    test = [{"text": row["text"], "ID": number} for number, row in enumerate(words.rows(4, seed=1))]
    benchmark = Raft(
        {"teas": RaftTask(task, words.different(12), test)}, tmp_path, str(place / "model"), RECIPE, folds=2
    )
    told = Told()
    found = benchmark.run(told)
    assert told.headings == ["teas: 12 training rows, 4 test rows, 2 labels"]
    assert list(told.stages) == ["Cross-validation", "Training", "Predicting"]
    assert benchmark.finished() == found["tasks"] and benchmark.run(resume=True) == found
    assert (tmp_path / "teas" / "predictions.csv").read_text().count("\n") == 5


def test_a_classifier_stays_one(tmp_path, place, task):
    """Its head is the task's, and is saved with the vectors."""
    words.enclosing().save_pretrained(tmp_path / "bert")
    tiny.classifier(vocab_size=len(words.VOCABULARY)).save_pretrained(tmp_path / "bert")
    outcome = experiment(
        place, task, tmp_path / "out", model=str(tmp_path / "bert"), recipe=RECIPE.changed(steps=1)
    ).run()
    assert outcome.results["steps"] == 1
    assert any("classifier" in name for name in StoredAdapter(tmp_path / "out").vectors()[0])
