"""A trained adapter's folder gets a head and weights, and everything that answers by it answers alike."""

import json
import math

import numpy as np
import pytest

from ia3 import (
    AdapterFolder,
    Experiment,
    FewShotClassifier,
    IA3Config,
    IA3Model,
    Readings,
    Recipe,
    Scorer,
    Task,
    load_base,
    predict,
)
from ia3.evaluation.forming import form_opinions
from ia3.evaluation.progress import Progress
from ia3.opinions.opinions import Opinions
from support import tiny, words
from support.serving import Running

RECIPE = Recipe.small().changed(steps=6)
ROWS = words.different(24, seed=3)
OTHERS = [{"text": row["text"]} for row in words.rows(9, seed=5)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opinions")
    words.save_model(folder / "model")
    return folder


def task(**fields):
    return Task(**{"name": "teas", "template": words.TEMPLATE, "choices": words.CHOICES, **fields})


@pytest.fixture(scope="module")
def trained(place):
    folder = place / "adapters" / "teas"
    outcome = Experiment(
        task(),
        ROWS,
        words.rows(12, seed=8),
        folder=folder,
        model=str(place / "model"),
        recipe=RECIPE,
        examples_per_label=10,
    ).run()
    return folder, outcome.results


def formed(place, recipe=RECIPE, rows=ROWS, folds=0, its=None, readings=None):
    base, tokenizer = load_base(str(place / "model"))
    config = IA3Config(task_type="CAUSAL_LM", acts_from="question")
    model = IA3Model(base, config)
    tiny.randomize(model, 4)
    found = form_opinions(
        Progress(),
        "",
        model,
        tokenizer,
        its or task(),
        rows,
        recipe,
        folds,
        output_dir=place / "out",
        readings=readings,
    )
    assert list(model.peft_config) == ["default"]
    return model.eval(), tokenizer, found


def test_the_folder_says_what_answers_and_metrics_what_each_is_worth(trained):
    folder, results = trained
    stored = AdapterFolder(folder)
    weights = results["opinions"]["weights"]
    assert stored.opinions.model_dump() == weights and max(weights.values()) > 0
    assert stored.metrics["opinions"] == results["opinions"]
    assert stored.calibration.temperature == 1 and stored.calibration.rows == 20
    assert set(results["cross_validation"]) == {"accuracy", "macro_f1"}
    if stored.opinions.fitted is not None:
        assert set(results["opinions"]["head"]) == set(results["trained"])


@pytest.mark.parametrize("weights", [{"vectors": 0.6, "head": 0.9}, {"head": 1.0}, {"vectors": 0.5}])
def test_predictions_are_the_weighed_sum(place, weights):
    model, tokenizer, found = formed(place, RECIPE.changed(opinions="head"))
    opinions = Opinions.of(weights, found.opinions.fitted)
    items = predict(model, tokenizer, task(), OTHERS, opinions=opinions, recipe=RECIPE)
    vectors = predict(model, tokenizer, task(), OTHERS, recipe=RECIPE)
    scorer = Scorer(model, tokenizer)
    states = scorer.states(scorer.questions(task().wordings(OTHERS), labelled=False)).numpy()
    head = found.opinions.fitted.log_probs(states)
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
    np.testing.assert_allclose(alone.opinions.fitted.weight, behind.opinions.fitted.weight, rtol=1e-2, atol=1e-4)
    assert len(readings)


def test_a_label_with_one_row_is_not_cross_validated(place):
    rows = [*ROWS[:8], {"text": "the tea was lovely", "label": "once"}]
    its = task(choices={**words.CHOICES, "once": "fine"})
    _, _, found = formed(place, rows=rows, its=its)
    assert found.held_out is None and "a label has a single row" in found.why
    assert found.opinions.model_dump() == {"vectors": 0.8, "head": 0.8}


def test_many_rows_and_labels_are_not_trained_for_each_fold(place, monkeypatch):
    monkeypatch.setattr("ia3.evaluation.forming._QUICK", 10)
    _, _, found = formed(place)
    assert found.held_out is None and "take long" in found.why
    _, _, found = formed(place, folds=2)  # unless somebody asks for it
    assert found.held_out is not None


def test_commands_the_service_and_the_classifier_answer_alike(place, trained, capsys):
    from ia3.cli import main

    folder, _ = trained
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
        served = server.http.post("/v1/classify", json={"adapter": "teas", "texts": texts}).json()["predictions"]
    finally:
        server.close()
    classified = FewShotClassifier.load(folder).predict_proba(texts)
    for index, item in enumerate(expected):
        for other in (found[index], many[index]["adapters"]["teas"], served[index]):
            assert other["label"] == item.label
            assert other["probabilities"] == pytest.approx(item.probabilities, abs=1e-5)
        assert classified[index] == pytest.approx([item.probabilities[label] for label in ("neg", "pos")], abs=1e-5)
    # Saved with other vectors, the opinions on these do not stay.
    tiny.randomize(model, 6)
    model.save_pretrained(place / "changed")
    assert AdapterFolder(place / "changed").opinions.model_dump() == Opinions().model_dump()


def test_vectors_alone_write_no_opinions(place):
    folder = place / "alone"
    Experiment(
        task(),
        ROWS,
        folder=folder,
        model=str(place / "model"),
        recipe=RECIPE.changed(opinions="vectors"),
        examples_per_label=6,
    ).run()
    assert not (folder / "opinions.json").exists() and not (folder / "head.safetensors").exists()


def test_a_head_alone_trains_no_vectors(place):
    folder = place / "headed"
    outcome = Experiment(
        task(),
        ROWS,
        words.rows(12, seed=8),
        folder=folder,
        model=str(place / "model"),
        recipe=RECIPE.changed(opinions="head"),
        examples_per_label=10,
    ).run()
    stored = AdapterFolder(folder)
    assert stored.opinions.model_dump() == {"vectors": 0.0, "head": 1.0} and outcome.results["steps"] == 0
    tensors, _ = stored.vectors()
    assert all((tensor == 1).all() for tensor in tensors.values())
    assert outcome.results["trained"] == outcome.results["opinions"]["head"]
