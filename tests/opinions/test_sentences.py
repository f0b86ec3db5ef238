"""A sentence encoder gives an opinion beside a language model's, and everything that answers by it answers alike."""

import json

import numpy as np
import pytest

from ia3 import (
    AdapterFolder,
    Experiment,
    FewShotClassifier,
    IA3Model,
    InputError,
    Recipe,
    Scorer,
    Task,
    load_base,
    predict,
)
from ia3.adapter.stored import SENTENCES_NAME
from ia3.evaluation.progress import Progress
from ia3.opinions.asking import HeadJob, heads_say
from ia3.opinions.head import fit_head
from ia3.opinions.sentences import Sentences, sentence_of
from ia3.serve.adapter import FILES, read_settings
from ia3.serve.uploads import check
from support import words
from support.sentences import write
from support.serving import Running

ROWS = words.different(24, seed=3)
TEST = words.rows(12, seed=8)
TEXTS = [row["text"] for row in words.rows(9, seed=5)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    words.save_model(folder / "model")
    write(folder / "encoder", sentence_bert_config={"max_seq_length": 8})
    return folder


def recipe(place, **changes):
    return Recipe.small().changed(steps=6, encoder=str(place / "encoder"), **changes)


@pytest.fixture(scope="module")
def trained(place):
    task = Task(name="teas", template=words.TEMPLATE, choices=words.CHOICES)
    experiment = Experiment(
        task, ROWS, TEST, folder=place / "adapters" / "teas", model=str(place / "model"), recipe=recipe(place)
    )
    return place / "adapters" / "teas", experiment.run().results


def test_embeddings_are_those_of_the_encoder(place):
    model, tokenizer = load_base(str(place / "encoder"), ["neg", "pos"])
    scorer = Scorer(model, tokenizer)
    texts = ["the tea was lovely", "soup", "the tea was lovely"]
    told: list[int] = []
    found = Sentences(str(place / "encoder")).embeddings(texts, told.extend)
    expected = scorer.embeddings(scorer.encode(texts, [["neg", "pos"]] * 3)).numpy()
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)
    assert sorted(told) == [0, 1, 2] and found.dtype == np.float32
    long = "the tea was lovely and the soup was bitter today"
    cut = Sentences(str(place / "encoder")).embeddings([long, long.rpartition(" ")[0]])
    np.testing.assert_allclose(cut[0], cut[1], atol=1e-6)  # the end is cut, not the beginning


def test_what_it_reads_are_the_columns_of_the_template_alone():
    task = Task(template="Tea: {{ a }}\nSoup: {{ b }}\nIt is", choices=words.CHOICES)
    assert sentence_of(task.wording({"a": "lovely", "b": "bitter", "label": "pos", "c": "no"})) == "lovely\nbitter"
    assert sentence_of(task.wording({"a": "lovely", "b": "", "label": "pos"})) == "lovely"


def test_which_encoder_a_recipe_means(place, monkeypatch):
    assert Sentences.found("none") is None and Sentences.found("auto") is None
    monkeypatch.setattr("ia3.opinions.sentences.sentence_folder", lambda: place / "encoder")
    assert Sentences.found("auto").name == "minilm"
    assert Sentences.found(str(place / "encoder")).name == str(place / "encoder")
    with pytest.raises(InputError, match=r"Expected a sentence encoder, found .*model.*; use minilm; see encoder"):
        Sentences.found(str(place / "model"))
    with pytest.raises(InputError, match="Expected a model's folder, found no"):
        Sentences.found(str(place / "nothing"))
    with pytest.raises(InputError, match="expected opinions of auto or head for the encoder 'x', found vectors"):
        Recipe.paper().changed(encoder="x")


def test_rows_of_no_fold_are_never_held_out():
    chance = np.random.default_rng(0)
    states = chance.normal(size=(14, 1, 3)).astype(np.float32)
    labels = ["a", "b"] * 7
    head, held_out = fit_head(states, labels, [*([0, 1, 2] * 4), -1, -1])
    assert held_out.shape == (12, 2) and head.weight.shape == (2, 1, 3)
    states[12:] += 50  # what they are decides the regressions of all folds
    _, other = fit_head(states, labels, [*([0, 1, 2] * 4), -1, -1])
    assert not np.allclose(held_out, other)


def test_heads_that_read_the_same_read_it_once(place, monkeypatch):
    model, tokenizer = load_base(str(place / "model"))
    scorer, encoder = Scorer(model, tokenizer), Sentences(str(place / "encoder"))
    head, _ = fit_head(encoder.embeddings(TEXTS), ["a", "b", "a"] * 3)
    read: list[str] = []
    embeddings = Sentences.embeddings

    def counted(self, texts, *args):
        read.extend(texts)
        return embeddings(self, texts, *args)

    monkeypatch.setattr(Sentences, "embeddings", counted)
    [question] = scorer.encode(["soup"], [["x"]])
    jobs = [HeadJob(head, question, encoder.name, text) for text in ("soup", "tea", "soup")]
    told: list[int] = []
    found = heads_say(scorer, jobs, told.extend)
    assert read == ["soup", "tea"] and sorted(told) == [0, 1, 2]
    assert found[0] == found[2] != found[1] and list(found[0]) == ["a", "b"]


def test_the_folder_has_its_head_and_metrics_say_what_it_is_worth(place, trained):
    folder, results = trained
    opinions = AdapterFolder(folder).opinions
    assert results["opinions"]["weights"] == opinions.weights and "sentences" in opinions.weights
    assert opinions.encoder == str(place / "encoder") and (folder / SENTENCES_NAME).is_file()
    assert set(results["opinions"]["sentences"]) == set(results["trained"])


def test_everything_answers_alike(place, trained, capsys):
    from ia3.cli import main

    folder, _ = trained
    stored = AdapterFolder(folder)
    base, tokenizer = load_base(str(place / "model"))
    model = IA3Model.from_pretrained(base, folder)
    told: list[int] = []
    expected = predict(
        model, tokenizer, stored.task, TEXTS, told.extend, recipe=stored.recipe, opinions=stored.opinions
    )
    assert sorted(told) == [*range(len(TEXTS))]
    without = stored.opinions.of({"vectors": 0.8, "head": 0.8}, stored.opinions.heads)
    others = predict(model, tokenizer, stored.task, TEXTS, recipe=stored.recipe, opinions=without)
    assert [one.probabilities for one in others] != [one.probabilities for one in expected]

    def command(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), "--json"])
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)

    found = command("predict", folder, *TEXTS)
    server = Running(place)
    try:
        served = server.http.post("/v1/classify", json={"adapter": "teas", "texts": TEXTS}).json()["predictions"]
    finally:
        server.close()
    classified = FewShotClassifier.load(folder).predict_proba(TEXTS)
    for index, item in enumerate(expected):
        for other in (found[index], served[index]):
            assert other["label"] == item.label
            assert other["probabilities"] == pytest.approx(item.probabilities, abs=1e-5)
        assert classified[index] == pytest.approx([item.probabilities[label] for label in ("neg", "pos")], abs=1e-5)


def test_a_classifier_and_heads_alone(place):
    made = FewShotClassifier(
        place / "model", words.TEMPLATE, words.CHOICES, recipe=recipe(place, opinions="head"), random_state=1
    )
    made.fit([row["text"] for row in ROWS], [row["label"] for row in ROWS])
    assert set(made.opinions_.weights) <= {"head", "sentences"} and "sentences" in made.opinions_.weights
    made.save(place / "classifier")
    assert (FewShotClassifier.load(place / "classifier").predict_proba(TEXTS) == made.predict_proba(TEXTS)).all()


def test_an_upload_names_no_encoder_of_its_own(place, trained):
    folder = place / "upload"
    folder.mkdir()
    for name in FILES:
        if (trained[0] / name).exists():
            (folder / name).write_bytes((trained[0] / name).read_bytes())
    with pytest.raises(InputError, match="Expected the sentence encoder minilm or none in an uploaded adapter, found"):
        check(folder)
    text = json.loads((folder / "opinions.json").read_text())
    (folder / "opinions.json").write_text(json.dumps({**text, "encoder": "minilm"}))
    check(folder)


class Said(Progress):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_with_many_rows_and_labels_no_vectors_are_trained(place, tmp_path, monkeypatch):
    monkeypatch.setattr("ia3.evaluation.forming.QUICK", 10)
    task = Task(name="teas", template=words.TEMPLATE, choices=words.CHOICES)
    fields = {"folder": tmp_path, "model": str(place / "model"), "test_rows": 1}
    said = Said()
    outcome = Experiment(task, ROWS, recipe=recipe(place), **fields).run(said)
    assert outcome.results["steps"] == 0 and "vectors" not in AdapterFolder(tmp_path).opinions.weights
    assert said.lines[0].startswith("No vectors are trained: that takes long for 24 rows of 2 labels")
    # Without an encoder, or where somebody asks for the weights, they are.
    for its in ({"recipe": recipe(place).changed(encoder="none")}, {"recipe": recipe(place), "folds": 2}):
        said = Said()
        assert Experiment(task, ROWS, **fields, **its).run(said).results["steps"] and not said.lines
    made = FewShotClassifier(place / "model", words.TEMPLATE, words.CHOICES, recipe=recipe(place))
    made.fit([row["text"] for row in ROWS], [row["label"] for row in ROWS])
    assert "vectors" not in made.opinions_.weights


def test_answers_that_differ_from_row_to_row_are_left_to_vectors(place, monkeypatch):
    """However many rows and labels there are: heads alone cannot answer for them."""
    monkeypatch.setattr("ia3.evaluation.forming.QUICK", 10)
    task = Task(name="teas", template=words.TEMPLATE, choices={"pos": "good {{ said }}", "neg": "bad {{ said }}"})
    made = FewShotClassifier(place / "model", task=task, recipe=recipe(place))
    made.fit([{**row, "said": "fine"} for row in ROWS], [row["label"] for row in ROWS])
    assert made.opinions_.weights == {"vectors": 1.0}


def test_an_adapter_whose_encoder_is_not_there_asks_the_engine_nothing(place, trained, tmp_path):
    """Each of its rows would look for the encoder on the model's thread, where all others wait."""
    for name in FILES:
        if (trained[0] / name).exists():
            (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    assert read_settings(str(tmp_path)).opinions.encoder == str(place / "encoder")
    text = json.loads((tmp_path / "opinions.json").read_text())
    (tmp_path / "opinions.json").write_text(json.dumps({**text, "encoder": str(tmp_path / "nowhere")}))
    with pytest.raises(InputError, match=r"^The sentence encoder: Expected a model's folder, found no"):
        read_settings(str(tmp_path))
