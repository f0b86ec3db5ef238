"""What training in Python leaves: a folder that every command takes."""

import json

import pytest

import ia3
from ia3 import IA3Config, Member, PeftModel, Recipe, Task, TFewTrainer, get_peft_model
from ia3.adapter.pretrained import load_base
from ia3.cli import main
from ia3.folder import AdapterFolder
from ia3.training.pretrain import MixtureTrainer
from support import words

TASK = Task.create(
    {"name": "reviews", "template": "review : {{ text }} answer :", "choices": {"pos": "good", "neg": "not good"}}
)
RECIPE = Recipe.small().changed(steps=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "model"
    words.save_model(folder)
    return folder


def trained(base, folder, **options):
    """A trainer that has trained, as README.md's example does."""
    model, tokenizer = load_base(str(base))
    model = get_peft_model(model, IA3Config(task_type="CAUSAL_LM"))
    arguments = RECIPE.training_arguments(folder, save_steps=2, disable_tqdm=True, **options)
    run = TFewTrainer(model, arguments, tokenizer, Member(TASK, words.rows(16)), RECIPE)
    run.train()
    return run


def command(capsys, *arguments):
    """Run the command line: exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


class TestTrainedInPython:
    @pytest.fixture(scope="class")
    def run(self, base, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        run = trained(base, folder, save_strategy="steps")
        run.model.save_pretrained(folder / "saved")
        run.save_model(str(folder / "whole"))
        return folder

    @pytest.mark.parametrize("name", ["saved", "whole", "checkpoint-2"])
    def test_every_command_takes_it(self, name, run, base, capsys, tmp_path):
        folder = run / name
        rows = tmp_path / "rows.csv"
        rows.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in words.rows(24)))
        code, out, err = command(capsys, "predict", folder, "the tea was lovely", "--json")
        assert code == 0 and json.loads(out)[0]["label"] in ("pos", "neg"), err
        code, out, err = command(capsys, "evaluate", folder, "--data", rows, "--json")
        assert code == 0 and json.loads(out)["rows"] == 24, err
        assert "rows duplicate training examples" in " ".join(err.split())  # it says what it has seen
        assert command(capsys, "inspect", folder, "--json")[0] == 0
        assert command(capsys, "merge", folder, "--output", tmp_path / "merged")[0] == 0
        assert Task.from_file(tmp_path / "merged" / "task.yaml").templates == TASK.templates

    def test_a_server_serves_it(self, run, base):
        from ia3.serve.store import Store, read_settings

        store = Store(run, base="model")
        assert {"saved", "whole", "checkpoint-2"} <= store.found.keys()
        settings = read_settings(str(run / "saved"))
        assert settings.task is not None and settings.recipe == RECIPE and not settings.calibrated

    def test_what_stands_there(self, run):
        folder = AdapterFolder(run / "saved")
        assert folder.required_task() == TASK and folder.recipe == RECIPE and folder.calibration is None
        seen = folder.seen()
        assert seen is not None and all(map(seen, words.rows(16)))
        assert not seen({"text": "another", "label": "pos"})


def test_members_of_a_fleet_have_a_task_each(base, tmp_path):
    model, tokenizer = load_base(str(base))
    model = ia3.IA3Model(model, {name: IA3Config(task_type="CAUSAL_LM") for name in ("one", "two")})
    tasks = {name: TASK.model_copy(update={"name": name}) for name in ("one", "two")}
    members = [Member(task, words.rows(8, seed=i), name) for i, (name, task) in enumerate(tasks.items())]
    arguments = RECIPE.training_arguments(tmp_path / "run", save_strategy="no", disable_tqdm=True)
    TFewTrainer(model, arguments, tokenizer, members, RECIPE).train()
    model.save_pretrained(tmp_path)
    for name, task in tasks.items():
        assert AdapterFolder(tmp_path / name).required_task() == task
    model.delete_adapter("two")
    assert set(model.adapter_folders) == {"one"}


def test_training_on_counts_rows_of_both_trainings(base, tmp_path):
    run = trained(base, tmp_path / "run", save_strategy="no")
    run.model.save_pretrained(tmp_path / "first")
    model, tokenizer = load_base(str(base))
    model = PeftModel.from_pretrained(model, tmp_path / "first", is_trainable=True)
    arguments = RECIPE.training_arguments(tmp_path / "run", save_strategy="no", disable_tqdm=True)
    more = [{"text": "the soup was stale and the cake", "label": "neg"}, {"text": "the tea is fresh", "label": "pos"}]
    TFewTrainer(model, arguments, tokenizer, Member(TASK, more), RECIPE).train()
    model.save_pretrained(tmp_path / "second")
    seen = AdapterFolder(tmp_path / "second").seen()
    assert seen is not None and all(map(seen, [*words.rows(16), *more]))


def test_a_mixture_of_tasks_leaves_no_single_one(base, tmp_path):
    run = trained(base, tmp_path / "run", save_strategy="no")
    assert run.model.adapter_folders
    arguments = RECIPE.training_arguments(tmp_path / "run", save_strategy="no", disable_tqdm=True)
    mixture = [(TASK.model_copy(update={"name": name}), words.rows(8)) for name in ("one", "two")]
    MixtureTrainer(run.model, arguments, run.processing_class, mixture, RECIPE).train()
    run.model.save_pretrained(tmp_path / "saved")
    assert AdapterFolder(tmp_path / "saved").task is None
