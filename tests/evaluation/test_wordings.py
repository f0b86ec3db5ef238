"""The wording by the rows: `choose_wording`, and what commands and classes do with it."""

import json
import math

import numpy as np
import pytest

from ia3 import Experiment, FewShotClassifier, Recipe, Scorer, Task, load_base
from ia3.adapter.stored import SEEN, StoredAdapter
from ia3.cli import main
from ia3.evaluation import wordings
from ia3.evaluation.progress import Progress
from ia3.evaluation.wordings import choose_wording, with_templates
from ia3.task.template import Template
from support import tiny, words

SMALL = Recipe.small().changed(steps=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and rows."""
    folder = tmp_path_factory.mktemp("place")
    words.save_model(folder / "model")
    words.write_csv(folder / "teas.csv", words.different(40))
    return folder


@pytest.fixture(scope="module")
def loaded(place):
    return load_base(str(place / "model"))


class Oracle:
    """Stands in for `Scorer.score`: knows the labels in some wordings, prefers an answer in all."""

    def __init__(self, knows, bias=3.0, noise=0.5):
        self.knows, self.bias, self.noise, self.asked = knows, bias, noise, []

    def __call__(self, scorer, questions, *args, on_progress=None, **kwargs):
        chance = np.random.default_rng(len(self.asked))
        found = []
        for question in questions:
            text = scorer.tokenizer.decode(question.prompt)
            right = int(any(word in text for word in words.GOOD))  # neg, pos
            strength = next((its for mark, its in self.knows.items() if mark in text), 0.0)
            scores = chance.normal(size=2) * self.noise + [self.bias, 0.0]
            scores[right] += strength
            self.asked.append(text)
            found.append(np.array(scores))
        if on_progress is not None:
            on_progress([*range(len(questions))])
        return found


@pytest.fixture
def oracle(monkeypatch):
    def use(**options):
        made = Oracle(**options)
        monkeypatch.setattr(Scorer, "score", lambda *args, **kwargs: made(*args, **kwargs))
        return made

    return use


def task_of(rows, forms):
    task = Task.infer(rows, choices={"pos": "good", "neg": "bad"})
    task._candidates = [Template(prompt=f"{{{{ text }}}} {form}") for form in forms]
    return task


FORMS = ["the tea is", "it is", "answer :", "what is it ?", "fine", "is it fine ?", "soup", "text :", "review :"]


def test_the_wording_that_knows_most_is_first(loaded, oracle):
    rows = words.different(32)
    oracle(knows={"answer": 6.0, "review": 3.0})
    task, found = choose_wording(*loaded, task_of(rows, FORMS), rows)
    assert [one.template.prompt for one in found[:2]] == ["{{ text }} answer :", "{{ text }} review :"]
    assert [one.prompt for one in task.templates] == ["{{ text }} answer :"]  # the others are clearly worse
    best, last = found[0], found[-1]
    # A model that prefers an answer by three nats does well when answers are balanced, and guesses otherwise.
    assert best.accuracy == 1 and best.log_loss < 0.3 < math.log(2) - 0.1 < last.log_loss
    assert best.rows == 32 > last.rows and best.labels == 2
    assert task.candidates == [] and len(found) == len(FORMS)


def test_equally_good_wordings_are_drawn_from(loaded, oracle):
    rows = words.different(32)
    oracle(knows={"answer": 4.0, "review": 4.0, "text": 4.0, "soup": 4.0})
    task, _ = choose_wording(*loaded, task_of(rows, FORMS), rows)
    assert len(task.templates) == 3


def test_luck_on_few_rows_does_not_win(loaded, oracle):
    """Of wordings that know nothing, none has a better log-loss than guessing by more than chance."""
    rows = words.different(32)
    oracle(knows={}, noise=1.0)
    _, found = choose_wording(*loaded, task_of(rows, FORMS), rows)
    assert found[0].bound > math.log(2) - 0.1


def test_worse_wordings_are_tried_on_fewer_rows(loaded, oracle):
    rows, seen = words.different(40), oracle(knows={"answer": 3.0})
    choose_wording(*loaded, task_of(rows, FORMS), rows)
    assert len(seen.asked) < len(FORMS) * 40 * 0.6


def test_long_texts_are_fewer(loaded, oracle):
    rows = [{**row, "text": row["text"] + " tea" * 400} for row in words.different(64)]
    seen = oracle(knows={"answer": 3.0})
    _, found = choose_wording(*loaded, task_of(rows, FORMS), rows)
    assert found[0].rows == 16 and len(seen.asked) < len(FORMS) * 16


def test_candidates_whose_answers_the_tokenizer_cannot_tell_apart_are_left_out(loaded):
    rows = [{**row, "label": {"pos": "good", "neg": "not good"}[row["label"]]} for row in words.different(8)]
    task = Task.infer(rows)
    asked = [one for one in task.candidates if one.choices == {"good": "yes", "not good": "no"}]  # <unk>, both
    task, found = choose_wording(*loaded, task, rows)
    assert asked and found and not {one.prompt for one in asked} & {one.template.prompt for one in found}


@pytest.mark.parametrize("labels, rows", [(2, 64), (7, 64), (8, 16)])
def test_rounds_stay_within_the_budget(labels, rows):
    lengths = [4 + 2 * labels] * 37
    rounds = wordings._rounds(lengths, rows, labels, 5120)
    counts, sizes, before = zip(*rounds, strict=True)
    assert sum(count * (size - known) for count, size, known in rounds) * lengths[0] <= 1.5 * 5120
    assert list(counts) == sorted(counts, reverse=True) and sizes[:-1] == before[1:] and before[0] == 0
    assert sizes[0] >= min(rows, 2 * labels) and counts[-1] >= 4


def test_some_labels_stand_for_many(loaded):
    rows = [{"text": f"tea {number}", "label": f"soup {number % 40}"} for number in range(80)]
    task = Task.infer(rows)
    some = wordings._some(task, rows)
    counts = {label: sum(row["label"] == label for row in some) for label in {row["label"] for row in some}}
    assert len(counts) == 8 and set(counts.values()) == {2}


def test_rows_are_balanced_as_far_as_labels_have_them():
    rows = [{"text": f"tea {number}", "label": "bad" if number % 10 else "good"} for number in range(200)]
    some = wordings._some(Task.infer(rows), rows)
    assert sum(row["label"] == "good" for row in some) == sum(row["label"] == "bad" for row in some) == 20


class Told(Progress):
    def __init__(self):
        self.said, self.shown = [], []

    def say(self, text):
        self.said.append(text)

    def wordings(self, title, ranking, taken):
        self.shown.append((title, ranking, taken))


def test_one_row_a_label_is_ranked_without_cross_validation(loaded):
    rows, told = words.different(2), Told()
    task, found = choose_wording(*loaded, Task.infer(rows), rows, progress=told)
    assert found and all(math.isfinite(one.log_loss) for one in found) and task.templates
    assert "without cross-validation" in told.said[0]


def test_codes_are_said_to_have_no_wording(loaded):
    rows, told = [{**row, "label": {"pos": "a", "neg": "a :"}[row["label"]]} for row in words.different(8)], Told()
    _, found = choose_wording(*loaded, Task.infer(rows), rows, progress=told)
    assert len(found) < 10 and "numbers or codes" in told.said[0]


def test_a_given_wording_stays(loaded):
    task = Task.create({"template": words.TEMPLATE, "choices": words.CHOICES})
    assert choose_wording(*loaded, task, words.rows(8)) == (task, [])


def test_a_classifier_keeps_the_plain_wording(tmp_path):
    tiny.build("bert", vocab_size=len(words.VOCABULARY)).save_pretrained(tmp_path)
    words.tokenizer().save_pretrained(tmp_path)
    task, told = Task.infer(words.rows(8)), Told()
    assert choose_wording(*load_base(str(tmp_path), task.labels), task, words.rows(8), progress=told) == (task, [])
    assert "reads no answers" in told.said[0]


def test_an_encoder_decoder_is_asked_too(tmp_path):
    tiny.build("t5", vocab_size=len(words.VOCABULARY)).save_pretrained(tmp_path)
    words.closing().save_pretrained(tmp_path)
    rows = words.different(8)
    task, found = choose_wording(*load_base(str(tmp_path)), Task.infer(rows), rows)
    assert found and task.templates[0] != Task.infer(rows).templates[0]


def test_templates_with_answers_of_their_own_keep_them():
    rows = [{"text": "tea", "label": label} for label in ("pos", "neg")]
    own = {"pos": "good", "neg": "bad"}
    task = with_templates(
        Task.infer(rows), [Template(prompt="{{ text }} is", choices=own), Template(prompt="{{ text }}:")]
    )
    assert task.answers(rows[0]) == own and task.answers(rows[0], template=1) == {"pos": "pos", "neg": "neg"}
    assert task.templates[0].choices is None and Task.create(task.model_dump()) == task


def test_an_experiment_trains_in_the_chosen_wording(place, tmp_path):
    rows, told = words.different(40), Told()
    options = {"model": str(place / "model"), "recipe": SMALL, "examples_per_label": 8, "folder": tmp_path / "out"}
    outcome = Experiment(Task.infer(rows), rows, **options).run(told)
    [(title, ranking, taken)] = told.shown
    saved = Task.from_file(tmp_path / "out" / "task.yaml")
    assert title == "Wordings" and [one.prompt for one in saved.templates] == [
        one.template.prompt for one in ranking[:taken]
    ]
    assert outcome.results["wordings"] == [one.to_dict() for one in ranking[:taken]]
    assert {"zero_shot", "zero_shot_balanced", "trained", "majority"} <= set(outcome.results)
    seen = StoredAdapter(tmp_path / "out").metrics[SEEN]
    assert sum(saved.fingerprint(row) in seen for row in rows) == 16


def test_seeds_choose_wordings_of_their_own(place, tmp_path):
    rows, told = words.different(40), Told()
    options = {"model": str(place / "model"), "recipe": SMALL, "examples_per_label": 4, "folder": tmp_path / "out"}
    fleet = {"seed": [0, 1], "learning_rate": [1e-3, 3e-3]}
    outcome = Experiment(Task.infer(rows), rows, **options, **fleet).run(told)
    assert [title for title, _, _ in told.shown] == ["Wordings seed-0-lr-0.001", "Wordings seed-1-lr-0.001"]
    for seed, (_, ranking, _) in enumerate(told.shown):
        for rate in ("0.001", "0.003"):
            name = f"seed-{seed}-lr-{rate}"
            saved = Task.from_file(tmp_path / "out" / name / "task.yaml")
            assert saved.templates[0].prompt == ranking[0].template.prompt
            assert outcome.trials[name]["wordings"][0] == ranking[0].to_dict()
    # Alone, a seed has the same results.
    alone = Experiment(Task.infer(rows), rows, **{**options, "folder": tmp_path / "alone"}, seed=1, learning_rate=1e-3)
    found = alone.run().results
    for key in ("zero_shot", "zero_shot_balanced", "trained", "wordings"):
        assert found[key] == outcome.trials["seed-1-lr-0.001"][key]


def test_a_classifier_chooses_too(place):
    rows = words.different(24)
    made = FewShotClassifier(str(place / "model"), recipe=SMALL)
    made.fit([row["text"] for row in rows], [row["label"] for row in rows])
    _, found = choose_wording(*load_base(str(place / "model")), Task.infer(rows), rows, SMALL)
    assert made.task_.templates[0].prompt == found[0].template.prompt
    assert made.predict(["the tea was lovely today"]).shape == (1,)
    given = FewShotClassifier(str(place / "model"), words.TEMPLATE, recipe=SMALL)
    given.fit([row["text"] for row in rows], [row["label"] for row in rows])
    assert [one.prompt for one in given.task_.templates] == [words.TEMPLATE]


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def test_suggest_prints_the_ranking_and_writes_a_task(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = ["tasks", "suggest", "--data", place / "teas.csv", "--model", place / "model", "--examples-per-label", 8]
    code, out, err = run(capsys, *options, "--json")
    ranking = json.loads(out)
    assert code == 0 and len(ranking) > 20, err
    assert {"template", "log_loss", "error", "accuracy", "rows", "labels"} <= set(ranking[0])
    code, out, err = run(capsys, *options, "--output", tmp_path / "task.yaml")
    assert code == 0 and ranking[0]["template"].splitlines()[-1] in out and "log-loss of 0.69" in out, err
    task = Task.from_file(tmp_path / "task.yaml")
    assert task.templates[0].prompt == ranking[0]["template"] and str(tmp_path / "task.yaml") in out
    train = ["train", "--data", place / "teas.csv", "--model", place / "model", "--examples-per-label", 8]
    code, out, err = run(capsys, *train, "--steps", 2, "--output", tmp_path / "out", "--json")
    # What training chooses is what suggest says.
    assert code == 0 and json.loads(out)["wordings"][0] == ranking[0], err


def test_suggest_refuses_a_folder_before_it_loads(place, tmp_path, capsys):
    code, _, err = run(capsys, "tasks", "suggest", "--data", place / "teas.csv", "--output", tmp_path)
    assert code == 2 and "--output" in err and err.count("\n") == 1
