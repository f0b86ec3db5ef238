"""A trained adapter's folder gets a head and weights, and everything that answers by it answers alike."""

import json
import math
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_softmax

from ia3 import (
    AdapterFolder,
    Experiment,
    FewShotClassifier,
    IA3Config,
    IA3Model,
    InputError,
    Readings,
    Recipe,
    Scorer,
    Task,
    load_base,
    predict,
)
from ia3.evaluation.checkpoints import Interrupted
from ia3.evaluation.forming import form_opinions
from ia3.evaluation.learner import Learner
from ia3.evaluation.prediction import Prediction
from ia3.evaluation.progress import Progress
from ia3.opinions.opinions import Opinions
from ia3.serve.adapter import FILES
from support import tiny, words
from support.serving import Running

RECIPE = Recipe.small().changed(steps=6)
ROWS = words.different(24, seed=3)
TEST = words.rows(12, seed=8)
OTHERS = [{"text": row["text"]} for row in words.rows(9, seed=5)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opinions")
    words.save_model(folder / "model")
    return folder


def task(**fields):
    return Task(**{"name": "teas", "template": words.TEMPLATE, "choices": words.CHOICES, **fields})


def experiment(place, folder, rows=ROWS, test=None, its=None, **fields):
    fields = {"recipe": RECIPE, "examples_per_label": 6, **fields}
    return Experiment(its or task(), rows, test, folder=folder, model=str(place / "model"), **fields)


@pytest.fixture(scope="module")
def trained(place):
    folder = place / "adapters" / "teas"
    outcome = experiment(place, folder, test=TEST, examples_per_label=10).run()
    return folder, outcome.results


def formed(place, recipe=RECIPE, rows=ROWS, folds=0, its=None, readings=None):
    base, tokenizer = load_base(str(place / "model"))
    config = IA3Config(task_type="CAUSAL_LM", acts_from="question")
    model = IA3Model(base, config)
    tiny.randomize(model, 4)
    learner = Learner(model, tokenizer, its or task(), rows, recipe, 0, place / "out", readings)
    found = form_opinions(Progress(), "", learner, folds)
    assert list(model.peft_config) == ["default"]
    return model.eval(), tokenizer, found


def test_the_folder_says_what_answers_and_metrics_what_each_is_worth(trained):
    folder, results = trained
    stored = AdapterFolder(folder)
    weights = results["opinions"]["weights"]
    assert stored.opinions.weights == weights and max(weights.values()) > 0
    assert stored.metrics["opinions"] == results["opinions"]
    assert stored.calibration.temperature == 1 and stored.calibration.rows == 20
    assert set(results["cross_validation"]) == {"accuracy", "macro_f1"}
    if "head" in weights:
        assert set(results["opinions"]["head"]) == set(results["trained"])


@pytest.mark.parametrize("memory", ["2GiB", "40KB"])
def test_what_head_and_vectors_read_is_read_once(place, memory, monkeypatch):
    model, tokenizer, found = formed(place)
    its = Opinions.of({"vectors": 0.6, "head": 0.9}, found.opinions.heads, found.opinions.balance)
    rows = [{"text": " ".join(row["text"] for row in OTHERS[:count])} for count in range(1, 10)] * 2
    rows = [{"text": f"{row['text']} {OTHERS[index % 9]['text']}"} for index, row in enumerate(rows)]
    tokens = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: tokens.append(args[0].numel()))

    def scores(some):
        tokens.clear()
        said = predict(model, tokenizer, task(), some, opinions=its, memory=memory)
        return [one.scores for one in said], sum(tokens)

    with monkeypatch.context() as patched:
        patched.setattr(Scorer, "keeping", lambda scorer, questions: scorer)
        twice, before = scores(rows)
        few = [scores(rows[:1])[1] for _ in range(2)][1]  # the first has trials
    done = []
    predict(model, tokenizer, task(), rows, done.extend, opinions=its, memory=memory)
    assert sorted(done) == list(range(len(rows)))
    once, after = scores(rows)
    assert after < 0.75 * before
    for one, other in zip(once, twice, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    # A row alone has too few tokens: its text is not read apart.
    assert scores(rows[:1])[1] == few


def test_a_merged_adapter_and_a_head_answer(place):
    model, tokenizer, found = formed(place)
    model.add_adapter("start", IA3Config(task_type="CAUSAL_LM"))
    tiny.randomize(model, 5, "start")
    model.set_adapter("start")
    its = Opinions.of({"vectors": 0.6, "head": 0.9}, found.opinions.heads, found.opinions.balance)
    rows = [{"text": " ".join(row["text"] for row in OTHERS)}] * 4

    def scores():
        return [one.scores for one in predict(model, tokenizer, task(), rows, opinions=its)]

    expected = scores()
    model.merge_adapter()
    for one, other in zip(scores(), expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("weights", [{"vectors": 0.6, "head": 0.9}, {"head": 1.0}, {"vectors": 0.5}])
def test_predictions_are_the_weighed_sum(place, weights):
    model, tokenizer, found = formed(place, RECIPE.changed(opinions="head"))
    opinions = Opinions.of(weights, found.opinions.heads)
    items = predict(model, tokenizer, task(), OTHERS, opinions=opinions, recipe=RECIPE)
    vectors = predict(model, tokenizer, task(), OTHERS, recipe=RECIPE)
    scorer = Scorer(model, tokenizer)
    states = scorer.states(scorer.questions(task().wordings(OTHERS), labelled=False)).numpy()
    head = found.opinions.heads["head"].log_probs(states)
    for item, alone, said in zip(items, vectors, head, strict=True):
        logs = {label: math.log(alone.probabilities[label]) for label in words.CHOICES}
        total = np.array(
            [
                weights.get("vectors", 0) * logs[label] + weights.get("head", 0) * said[index]
                for index, label in enumerate(sorted(words.CHOICES))
            ]
        )
        expected = np.exp(total - np.logaddexp.reduce(total))
        assert [item.probabilities[label] for label in sorted(words.CHOICES)] == pytest.approx(expected, abs=1e-5)


def test_readings_and_the_adapter_change_nothing(place):
    _, _, alone = formed(place, RECIPE.changed(opinions="head"))
    readings = Readings()
    _, _, behind = formed(place, RECIPE.changed(opinions="head"), readings=readings)
    np.testing.assert_allclose(
        alone.opinions.heads["head"].weight, behind.opinions.heads["head"].weight, rtol=1e-2, atol=1e-4
    )
    assert len(readings)


def test_labels_with_one_row_are_not_cross_validated(place):
    rows = [ROWS[0], next(row for row in ROWS if row["label"] != ROWS[0]["label"])]
    _, _, found = formed(place, rows=rows)
    assert found.held_out is None and "labels have single rows" in found.why
    assert (found.opinions.vectors, found.opinions.head) == (0.55, 0.55)


def test_duplicates_are_one_row_in_cross_validation(place):
    rows = [{"text": "tea lovely", "label": "pos"}] * 4 + [{"text": "tea awful", "label": "neg"}] * 4
    _, _, found = formed(place, rows=rows)
    assert found.held_out is None and "duplicates" in found.why


def test_the_classifier_with_a_head_alone(place):
    texts, labels = [row["text"] for row in ROWS], [row["label"] for row in ROWS]
    made = FewShotClassifier(place / "model", words.TEMPLATE, words.CHOICES, recipe=RECIPE.changed(opinions="head"))
    expected = made.fit(texts, labels).predict_proba(texts)
    made.save(place / "classifier")
    assert (FewShotClassifier.load(place / "classifier").predict_proba(texts) == expected).all()
    assert AdapterFolder(place / "classifier").opinions.seen["pos"] == pytest.approx(0.5, abs=0.2)


def test_opinions_of_another_task_are_refused(place, trained):
    shutil.copytree(trained[0], place / "foreign")
    (place / "foreign" / "opinions.json").write_text('{"vectors": 1, "balance": [{"spam": 1, "pos": 2}]}')
    with pytest.raises(InputError, match=r"Expected opinions on the task's labels .*, found 'pos', 'spam'; train anew"):
        _ = AdapterFolder(place / "foreign").opinions


def test_many_rows_and_labels_are_not_trained_for_each_fold(place, monkeypatch):
    monkeypatch.setattr("ia3.evaluation.forming.QUICK", 10)
    _, _, found = formed(place)
    assert found.held_out is None and "take long" in found.why
    _, _, found = formed(place, folds=2)  # unless somebody asks for it
    assert found.held_out is not None


def two():
    """The task in two wordings, with answers of their own."""
    second = {"prompt": "text : {{ text }} what is it ?", "choices": {"neg": "bad", "pos": "not bad"}}
    return Task(name="teas", choices=words.CHOICES, templates=[{"prompt": words.TEMPLATE}, second])


BALANCE = [{"pos": 0.75, "neg": -0.75}, {"pos": -0.5, "neg": 0.5}]


def test_log_probabilities_in_each_wording_are_averaged(place):
    model, tokenizer, found = formed(place, RECIPE.changed(opinions="head"))
    heads, its = found.opinions.heads, two()
    opinions = Opinions.of({"vectors": 0.7, "head": 0.9}, heads, BALANCE)
    done = []
    items = predict(model, tokenizer, its, OTHERS, done.extend, opinions=opinions, recipe=RECIPE)
    assert sorted(done) == [*range(len(OTHERS))]  # each once
    each = []
    for template, shift in enumerate(BALANCE):
        alone = predict(model, tokenizer, its, OTHERS, template=template, recipe=RECIPE)
        each.append([log_softmax([one.scores[name] + shift[name] for name in ("neg", "pos")]) for one in alone])
    by_head = predict(model, tokenizer, its, OTHERS, opinions=Opinions.of({"head": 1.0}, heads), recipe=RECIPE)
    for item, first, second, one in zip(items, *each, by_head, strict=True):
        said = np.log([one.probabilities[name] for name in ("neg", "pos")])
        expected = np.exp(log_softmax(0.7 * (first + second) / 2 + 0.9 * said))
        assert [item.probabilities[name] for name in ("neg", "pos")] == pytest.approx(expected.tolist(), abs=1e-5)
        assert not np.allclose(first, second, atol=0.01)
    with pytest.raises(InputError, match=r"Expected the first templates, .* found template 1"):
        predict(model, tokenizer, its, OTHERS, template=1, opinions=opinions)
    with pytest.raises(InputError, match="Expected a task with the 2 templates that opinions ask in, found 1"):
        predict(model, tokenizer, task(), OTHERS, opinions=opinions)


def by_vectors(place, stored):
    """The metrics of a folder's vectors on the test rows, in all wordings that ask them."""
    base, tokenizer = load_base(str(place / "model"))
    model = IA3Model.from_pretrained(base, stored).eval()
    alone = Opinions.of({"vectors": 1.0}, balance=stored.opinions.balance)
    assert len(alone.balance) == len(stored.task.templates) == 2
    items = predict(model, tokenizer, stored.task, TEST, recipe=stored.recipe, opinions=alone)
    return stored.task.metrics([row["label"] for row in TEST], [item.best for item in items])


def test_an_experiment_balances_and_measures_each_wording(place, monkeypatch):
    monkeypatch.setattr("ia3.evaluation.forming.weigh", lambda *_: {"vectors": 1.0})
    folder = place / "wordings"
    outcome = experiment(place, folder, test=TEST, its=two()).run()
    stored = AdapterFolder(folder)
    first, second = stored.opinions.balance
    assert first != second and all(sum(shift.values()) == pytest.approx(0, abs=1e-6) for shift in (first, second))
    assert outcome.results["trained"] == outcome.results["opinions"]["vectors"] == by_vectors(place, stored)
    experiment(place, folder, its=two(), recipe=RECIPE.changed(templates="first")).run()
    assert len(AdapterFolder(folder).opinions.balance) == 1  # training never saw the second
    fields = AdapterFolder(folder).opinions.model_dump() | {"balance": [first] * 3}
    (folder / "opinions.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="Expected a task with the 3 templates that opinions ask in, found 2"):
        _ = AdapterFolder(folder).opinions


@pytest.fixture
def in_two_wordings(place):
    """A folder whose vectors are asked in two wordings, beside a head."""
    folder = place / "adapters" / "two"
    _, _, found = formed(place, RECIPE.changed(opinions="head"))
    shutil.copytree(place / "adapters" / "teas", folder)
    (folder / "task.yaml").write_text(two().to_yaml())
    opinions = Opinions.of({"vectors": 0.7, "head": 0.9}, found.opinions.heads, BALANCE)
    for name, data in opinions.files().items():
        (folder / name).write_bytes(data)
    return folder


def test_commands_the_service_and_the_classifier_answer_alike_in_two_wordings(place, trained, in_two_wordings, capsys):
    answers_alike(place, in_two_wordings, capsys)


def test_commands_the_service_and_the_classifier_answer_alike(place, trained, capsys):
    folder, _ = trained
    model = answers_alike(place, folder, capsys)
    # Saved with other vectors, the opinions on these do not stay.
    tiny.randomize(model, 6)
    model.save_pretrained(place / "changed")
    assert AdapterFolder(place / "changed").opinions.model_dump() == Opinions().model_dump()


def answers_alike(place, folder, capsys):
    from ia3.cli import main

    stored = AdapterFolder(folder)
    base, tokenizer = load_base(str(place / "model"))
    model = IA3Model.from_pretrained(base, folder)
    texts = [row["text"] for row in OTHERS]
    expected = predict(model, tokenizer, stored.task, texts, recipe=stored.recipe, opinions=stored.opinions)

    def command(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), "--json"])
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)

    found = command("predict", folder, *texts)
    many = command("predict", folder.parent, *texts, "--all-adapters")
    server = Running(place)
    try:
        served = server.http.post("/v1/classify", json={"adapter": folder.name, "texts": texts}).json()["predictions"]
        files = [("files", (name, (folder / name).read_bytes())) for name in FILES if (folder / name).exists()]
        response = server.http.post("/v1/adapters", data={"name": f"{folder.name}-up"}, files=files)
        assert response.status_code == 201, response.text
        again = server.http.post("/v1/classify", json={"adapter": f"{folder.name}-up", "texts": texts}).json()[
            "predictions"
        ]
    finally:
        server.close()
    classified = FewShotClassifier.load(folder).predict_proba(texts)
    for index, item in enumerate(expected):
        for other in (found[index], many[index]["adapters"][folder.name], served[index], again[index]):
            assert other["label"] == item.label
            assert other["probabilities"] == pytest.approx(item.probabilities, abs=1e-5)
        assert classified[index] == pytest.approx([item.probabilities[label] for label in ("neg", "pos")], abs=1e-5)
    return model


class TestPrior:
    """Rows to draw from of which three quarters are one label; examples are balanced."""

    ROWS = [row for row in words.different(96, seed=4) if row["label"] == "pos"][:36] + [
        row for row in words.different(96, seed=4) if row["label"] == "neg"
    ][:12]

    def experiment(self, place, folder, **fields):
        fields = {"test_rows": 10, "recipe": RECIPE.changed(opinions="head"), "examples_per_label": 8, **fields}
        return experiment(place, folder, self.ROWS, **fields)

    def test_the_file_shows_it_but_its_test_rows_do_not(self, place, tmp_path, monkeypatch):
        assert self.experiment(place, tmp_path).trials[0].shares is None  # so few rows would invent it
        monkeypatch.setattr("ia3.evaluation.drawing._TELLING", 20)
        experiment = self.experiment(place, tmp_path)
        [trial] = experiment.trials
        left = [row for row in self.ROWS if row not in trial.test and row not in trial.examples]
        each = len(self.ROWS) - 16
        counts = {name: 8 + sum(row["label"] == name for row in left) * each / len(left) + 1 for name in words.CHOICES}
        assert trial.shares == pytest.approx({name: count / sum(counts.values()) for name, count in counts.items()})
        experiment.run()
        opinions = AdapterFolder(tmp_path).opinions
        assert opinions.prior == pytest.approx(trial.shares) and opinions.seen == {"pos": 0.5, "neg": 0.5}

    def test_all_rows_are_tested(self, place, tmp_path):
        [trial] = self.experiment(place, tmp_path, test_rows=0).trials
        assert trial.shares is None  # only test rows could say
        [trial] = self.experiment(place, tmp_path, examples_per_label=0).trials
        assert trial.shares == pytest.approx({"pos": 37 / 50, "neg": 13 / 50})

    @pytest.mark.parametrize("prior", ["balanced", {"pos": 0.9, "neg": 0.1}])
    def test_it_is_as_given(self, place, tmp_path, prior):
        self.experiment(place, tmp_path, prior=prior).run()
        expected = {"pos": 0.5, "neg": 0.5} if prior == "balanced" else prior
        assert AdapterFolder(tmp_path).opinions.prior == pytest.approx(expected)

    def test_rows_without_labels_show_it(self, place, tmp_path):
        pool = [{"text": row["text"]} for row in self.ROWS if row["label"] == "pos"]
        self.experiment(place, tmp_path, unlabelled=pool).run()
        assert AdapterFolder(tmp_path).opinions.prior["pos"] > 0.6

    def test_where_vectors_answer_alone_nothing_is_moved(self, place, tmp_path):
        for fields in ({"prior": "balanced"}, {"unlabelled": [{"text": "tea"}]}):
            with pytest.raises(
                InputError, match="found vectors that answer alone; use --opinions auto, or leave out prior"
            ):
                self.experiment(place, tmp_path, recipe=RECIPE.changed(opinions="vectors"), **fields).run()

    def test_a_temperature_does_not_change_it(self):
        seen, prior = {"a": 0.5, "b": 0.5}, {"a": 0.8, "b": 0.2}
        scores = {"a": -1.0, "b": -2.0}
        found = Prediction.of(Opinions().toward(prior, seen).together([scores], temperature=2.0), 2.0).probabilities
        assert found["a"] / found["b"] == pytest.approx(math.exp(0.5) * 4)

    def test_what_does_not_fit_is_refused(self, place, tmp_path):
        with pytest.raises(InputError, match="Expected shares above 0 that add up to 1, found"):
            self.experiment(place, tmp_path, prior={"pos": 0.9, "neg": 0.9}).run()
        with pytest.raises(InputError, match="Expected rows without labels, found none"):
            self.experiment(place, tmp_path, unlabelled=[]).run()
        with pytest.raises(InputError, match="Expected shares of the labels 'pos', 'neg', found 'pos'"):
            self.experiment(place, tmp_path, prior={"pos": 1.0}).run()
        with pytest.raises(InputError, match=r'Expected a prior "file", "balanced" or label → share, found .fair'):
            self.experiment(place, tmp_path, prior="fair").run()
        with pytest.raises(
            InputError, match="The rows without labels: The template names 'text', but the columns are 'words'"
        ):
            self.experiment(place, tmp_path, unlabelled=[{"words": "lovely"}]).run()

    def test_commands_move_probabilities(self, place, tmp_path, capsys):
        from ia3.cli import main

        self.experiment(place, tmp_path / "teas", prior={"pos": 0.8, "neg": 0.2}).run()

        def command(*arguments):
            with pytest.raises(SystemExit) as ended:
                main(["predict", *map(str, arguments), "--json"])
            out, err = capsys.readouterr()
            return ended.value.code or 0, json.loads(out) if out else err

        _, [as_trained] = command(tmp_path / "teas", "the tea was lovely")
        _, [balanced] = command(tmp_path / "teas", "the tea was lovely", "--prior", "balanced")

        def odds(item):
            return item["probabilities"]["pos"] / item["probabilities"]["neg"]

        assert odds(as_trained) == pytest.approx(odds(balanced) * 4, rel=1e-4)
        code, err = command(tmp_path / "teas", "the tea was lovely", "--prior", "pos=2")
        assert code == 2 and "--prior" in err and "Expected one share between 0 and 1" in err


def test_vectors_alone_write_no_opinions(place):
    folder = place / "alone"
    experiment(place, folder, recipe=RECIPE.changed(opinions="vectors")).run()
    assert not (folder / "opinions.json").exists() and not (folder / "head.safetensors").exists()


def test_each_of_several_seeds_has_its_own(place):
    folder = place / "several"
    outcome = experiment(place, folder, test=TEST, its=two(), seed=(0, 1)).run()
    heads = [AdapterFolder(folder / name).opinions.heads.get("head") for name in ("seed-0", "seed-1")]
    for name, results in outcome.trials.items():
        stored = AdapterFolder(folder / name)
        assert results["opinions"]["weights"] == stored.opinions.weights
        assert results["opinions"]["vectors"] == by_vectors(place, stored)
    assert None in heads or not np.array_equal(heads[0].weight, heads[1].weight)


def test_a_head_alone_trains_no_vectors(place):
    folder = place / "headed"
    head = RECIPE.changed(opinions="head")
    outcome = experiment(place, folder, test=TEST, recipe=head, examples_per_label=10).run()
    stored = AdapterFolder(folder)
    assert (stored.opinions.vectors, stored.opinions.head) == (0, 1) and outcome.results["steps"] == 0
    tensors, _ = stored.vectors()
    assert all((tensor == 1).all() for tensor in tensors.values())
    assert outcome.results["trained"] == outcome.results["opinions"]["head"]
    assert "vectors" not in outcome.results["opinions"]
    rowwise = Task(template=words.TEMPLATE, choices="{{ a }} ||| {{ b }}")
    rows = [{**row, "a": "good", "b": "bad", "label": str(int(row["label"] == "pos"))} for row in ROWS]
    with pytest.raises(InputError, match="a head to answer in the first template alone, found all templates"):
        experiment(place, place / "no", recipe=head, all_templates=True).run()
    with pytest.raises(InputError, match="same labels for all rows"):
        experiment(place, place / "no", rows, its=rowwise, recipe=head).run()


POOL = [{"text": row["text"]} for row in words.different(60, seed=11)]


class TestRowsWithoutLabels:
    def formed(self, place, **fields):
        base, tokenizer = load_base(str(place / "model"))
        model = IA3Model(base, IA3Config(task_type="CAUSAL_LM", acts_from="question"))
        recipe = RECIPE.changed(opinions="head")
        return form_opinions(Progress(), "", Learner(model, tokenizer, task(), ROWS, recipe), **fields)

    def test_heads_learn_from_them_where_cross_validation_agrees(self, place):
        before = self.formed(place)
        after = self.formed(place, unlabelled=POOL)
        said = re.search(r"; 60 rows without labels: log-loss ([\d.]+) → ([\d.]+)(, so they are left out)?$", after.why)
        assert said, after.why
        heads = [one.opinions.heads["head"] for one in (before, after)]
        alike = np.array_equal(heads[0].weight, heads[1].weight)
        assert alike == (said[3] is not None) == (float(said[2]) >= float(said[1]))

    @pytest.mark.parametrize("better", [True, False])
    def test_the_lower_log_loss_decides(self, place, monkeypatch, better):
        def trained(examples, heads, weights, folds):
            [(name, head)] = heads.items()
            labels = np.array([head.labels.index(row["label"]) for row in ROWS])
            right = np.log(np.where(np.eye(2)[labels] == better, 0.99, 0.01))
            return {name: replace(head, bias=head.bias + 1)}, {name: right}

        monkeypatch.setattr("ia3.evaluation.forming.self_train", trained)
        before, after = self.formed(place), self.formed(place, unlabelled=POOL)
        moved = after.opinions.heads["head"].bias - before.opinions.heads["head"].bias
        assert moved == pytest.approx(1 if better else 0, abs=1e-5)
        assert after.why.endswith("left out") != better


def test_labels_that_no_wording_can_name_are_left_to_heads(tmp_path):
    tokenizer = words.tokenizer()
    tokenizer.add_tokens(["0", "1"])
    tiny.build("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": row["text"], "label": str(int(row["label"] == "pos"))} for row in ROWS]
    said = []

    class Said(Progress):
        def say(self, text):
            said.append(text)

    def steps(its, **fields):
        fields = {
            "model": str(tmp_path / "model"),
            "recipe": RECIPE,
            "test_rows": 2,
            "folder": tmp_path / "out",
            **fields,
        }
        return Experiment(its, rows, **fields).run(Said()).results["steps"]

    assert steps(Task.infer(rows)) == 0 and said[0].startswith("No vectors are trained: no wording can name labels")
    assert steps(Task.infer(rows, choices={"0": "bad", "1": "good"}))
    assert steps(Task.infer(rows, template=words.TEMPLATE))
    assert steps(Task.infer(rows), folds=2)
    made = FewShotClassifier(tmp_path / "model", recipe=RECIPE).fit(
        [row["text"] for row in rows], [int(row["label"]) for row in rows]
    )
    assert set(made.opinions_.weights) == {"head"} and made.classes_.tolist() == [0, 1]


class TestRareLabels:
    """A label with one row beside others with many."""

    ROWS = (*ROWS[:16], {"text": "the tea was lovely", "label": "once"})

    def test_the_others_are_cross_validated(self, place):
        its = task(choices={**words.CHOICES, "once": "fine"})
        pool = [{"text": row["text"]} for row in words.different(20, seed=11)]
        _, _, found = formed(place, RECIPE.changed(opinions="head"), [*self.ROWS], its=its)
        assert len(found.held_out) == len(found.labels) == 16 and "once" not in found.labels
        assert found.opinions.heads["head"].labels == ("neg", "once", "pos")
        assert found.why == "weighed on 16 training rows in 4 folds"
        base, tokenizer = load_base(str(place / "model"))
        model = IA3Model(base, IA3Config(task_type="CAUSAL_LM", acts_from="question"))
        rows = [self.ROWS[-1], *self.ROWS[:-1]]  # wherever it stands
        learner = Learner(model, tokenizer, its, rows, RECIPE.changed(opinions="head"))
        again = form_opinions(Progress(), "", learner, unlabelled=pool)
        assert "20 rows without labels" in again.why and len(again.held_out) == 16

    def test_vectors_and_head_are_weighed(self, place):
        its = task(choices={**words.CHOICES, "once": "fine"})
        _, _, found = formed(place, rows=[*self.ROWS], its=its)
        assert len(found.held_out) == 16 and found.why.startswith("weighed on 16")
        assert set(found.opinions.balance[0]) == {"neg", "once", "pos"}


def test_an_interruption_while_opinions_form_can_be_gone_on_from(place, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ia3.evaluation.forming.fit_head", interrupted)
        with pytest.raises(Interrupted) as caught:
            experiment(place, tmp_path).run()
    assert caught.value.checkpoint is not None and (tmp_path / "adapter_model.safetensors").is_file()
    with pytest.warns(UserWarning, match="interrupted before its opinions were formed.*--resume finishes it"):
        assert AdapterFolder(tmp_path).opinions.weights == {"vectors": 1.0}
    outcome = experiment(place, tmp_path).run(resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(AdapterFolder(tmp_path).opinions.weights) > 1
    assert outcome.results["opinions"]["weights"] and not (tmp_path / "checkpoints").exists()
