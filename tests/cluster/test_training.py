"""`ia3 train --ray`: adapters and numbers of a run without it, also if a worker dies or the run is interrupted."""

import json
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from ia3 import InputError, Recipe, Task
from ia3.cluster.training import _dealt, _require_progress, run
from ia3.evaluation.checkpoints import Interrupted
from ia3.evaluation.experiment import Experiment
from ia3.evaluation.progress import Progress, Stage
from support import words

TEMPLATE = "review : {{ text }} answer :"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, rows and two tasks, of which one has its own test rows."""
    folder = tmp_path_factory.mktemp("place")
    words.save_model(folder / "model")
    for name, rows in (("train", words.different(40)), ("test", words.rows(24, seed=1))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = {"template": TEMPLATE, "train": "train.jsonl"}
    (folder / "tasks").mkdir()
    for name in ("train", "test"):
        (folder / "tasks" / f"{name}.jsonl").write_text((folder / f"{name}.jsonl").read_text())
    Task(name="teas", choices={"pos": "good", "neg": "not good"}, test="test.jsonl", **shared).save(
        folder / "tasks/teas.yaml"
    )
    Task(name="soups", choices={"pos": "fine", "neg": "bad"}, **shared).save(folder / "tasks/soups.yaml")
    return folder


def same(folder, other, names, resumed=False):
    """Whether adapters have the same vectors, and the same numbers but for how long they took and how many there were; and for the
    loss where it is that of the steps since a checkpoint."""
    for name in names:
        ours, theirs = (load_file(one / name / "adapter_model.safetensors") for one in (folder, other))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=0, msg=f"{name} {key}")
        ours, theirs = (json.loads((one / name / "metrics.json").read_text()) for one in (folder, other))
        for found in (ours, theirs):
            found.pop("train_seconds")
            found.pop("trained_at_once")
        losses = ours.pop("train_loss"), theirs.pop("train_loss")
        assert resumed or losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert ours == theirs
        files = [sorted(path.name for path in (one / name).iterdir()) for one in (folder, other)]
        assert files[0] == files[1]


@pytest.mark.slow
def test_the_adapters_are_those_of_a_run_without_ray(started_ray, ia3, place, tmp_path):
    options = {
        "tasks": f"{place}/tasks/*.yaml",
        "seeds": "0,1",
        "model": place / "model",
        "steps": 6,
        "opinions": "vectors",
    }
    code, alone, err = ia3("train", "--json", **options, output=tmp_path / "alone")
    assert code == 0, err
    code, out, err = ia3("train", "--json", **options, output=tmp_path / "shared", ray="local")
    assert code == 0, err
    assert "2 workers, each with 1 core" in err and err.count("Training teas/seed-1") == 1
    found, alone = json.loads(out), json.loads(alone)
    names = ["soups/seed-0", "soups/seed-1", "teas/seed-0", "teas/seed-1"]
    assert list(found["members"]) == names == list(alone["members"])
    assert found["summary"].keys() == alone["summary"].keys()
    same(tmp_path / "shared", tmp_path / "alone", names)
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["metrics.json", "soups", "teas"]


def experiment(place, folder, **fields):
    task = Task(name="teas", choices=words.CHOICES, template=TEMPLATE)
    model = str(place / "model")
    fields = {"model": model, "seed": [0, 1, 2, 3], "examples_per_label": 8, "test_rows": 8, **fields}
    recipe = Recipe.for_model(model).changed(opinions="vectors", steps=60)
    return Experiment(task, words.different(40), folder=folder, recipe=recipe, **fields)


NAMES = ["seed-0", "seed-1", "seed-2", "seed-3"]


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(started_ray, place, tmp_path, kill):
    experiment(place, tmp_path / "alone").run()
    said, killed = [], []

    class Saying(Progress):
        def say(self, text):
            said.append(text)

    def watch():
        while not killed:
            if list((tmp_path / "shared").glob("checkpoints/part-*/checkpoint-*/trainer_state.json")) and kill("_work"):
                killed.append(True)
            time.sleep(0.01)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    outcome = run(experiment(place, tmp_path / "shared"), started_ray, Saying())
    killed.append(False)
    assert killed[0] and any("A worker died; another one goes on" in text for text in said), said
    assert list(outcome.trials) == NAMES
    same(tmp_path / "shared", tmp_path / "alone", NAMES, resumed=True)
    assert not (tmp_path / "shared" / "checkpoints").exists()


@pytest.mark.slow
def test_an_interrupted_run_goes_on(started_ray, place, tmp_path, ia3):
    experiment(place, tmp_path / "alone").run()

    class Interrupting(Progress):
        def stage(self, title, total, done=0):
            class Stopping(Stage):
                def reach(self, done):
                    if title.startswith("Training") and done > 20:
                        raise KeyboardInterrupt

            return Stopping()

    with pytest.raises(Interrupted) as ended:
        run(experiment(place, tmp_path / "shared"), started_ray, Interrupting())
    assert "part-" in ended.value.checkpoint
    with pytest.raises(InputError, match="the settings of the interrupted run, found another 'members'"):
        run(experiment(place, tmp_path / "shared", seed=[0, 1]), started_ray, resume=True)
    run(experiment(place, tmp_path / "shared"), started_ray, resume=True)
    same(tmp_path / "shared", tmp_path / "alone", NAMES, resumed=True)


@pytest.mark.slow
def test_what_is_wrong_on_a_worker_is_said_here(started_ray, place, tmp_path):
    broken = experiment(place, tmp_path / "out", model=str(tmp_path / "gone"))
    with pytest.raises(InputError, match="gone"):
        run(broken, started_ray)


def test_there_must_be_checkpoints_to_resume_from(ia3, place, tmp_path):
    options = {"task": place / "tasks/teas.yaml", "model": place / "model", "seeds": "0,1", "output": tmp_path / "none"}
    code, _, err = ia3("train", "--resume", **options, ray="local")
    assert code == 2 and "Expected checkpoints of a run on Ray" in err and "start anew without --resume" in err
    code, _, err = ia3("train", **options, workers=2)
    assert code == 2 and "Expected --ray with --workers" in err


def test_neighbours_stay_together():
    assert _dealt(list("abcde"), 2) == [["a", "b"], ["c", "d", "e"]]
    assert _dealt(list("ab"), 8) == [["a"], ["b"]]


def test_workers_that_die_again_and_again():
    _require_progress([None, None], ["a"], RuntimeError("gone"))
    _require_progress([None, None, "checkpoint-4"], ["a"], RuntimeError("gone"))
    with pytest.raises(
        InputError, match=r"3 died one after the other while they trained 'a': out of memory; .* by workers"
    ):
        _require_progress(["checkpoint-4"] * 3, ["a"], RuntimeError("out of memory"))
