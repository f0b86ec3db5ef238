"""`FewShotClassifier` is a scikit-learn estimator, learns what the trainer learns, and writes what `ia3 train` writes."""

import gc
import json
import threading
import warnings
import weakref

import datasets
import joblib
import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
from safetensors.torch import load_file
from sklearn.base import clone
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ia3.adapter.pretrained
from ia3 import (
    AdapterFolder,
    FewShotClassifier,
    IA3Config,
    IA3Model,
    InputError,
    Member,
    Recipe,
    Task,
    TFewTrainer,
    load_base,
)
from ia3.cli import main
from support import tiny, words

ROWS = words.rows(32)
TEXTS, LABELS = [row["text"] for row in ROWS], [row["label"] for row in ROWS]
QUICK = Recipe(steps=3, warmup=0, learning_rate=0.02)
TEMPLATE = "review : {{ text }} answer :"
CHOICES = {"pos": "good", "neg": "not good"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model's folder."""
    made = tmp_path_factory.mktemp("base") / "model"
    words.save_model(made)
    return made


@pytest.fixture
def make(folder):
    """A classifier on the tiny model, which trains in a moment."""

    def made(**params):
        return FewShotClassifier(**{"model": str(folder), "recipe": QUICK, **params})

    return made


@pytest.fixture
def loads(monkeypatch):
    """The names of the base models that are loaded."""
    names, load = [], ia3.adapter.pretrained.load_base

    def counted(name, *args):
        names.append(name)
        return load(name, *args)

    monkeypatch.setattr("ia3.adapter.pretrained.load_base", counted)
    return names


def forget():
    """Let no base model be found in memory, as in a new process."""
    ia3.classifier._USED_LAST.clear()
    ia3.classifier._BASES.clear()


# Learning.


def test_three_lines_from_two_lists_to_a_classifier(folder):
    recipe = Recipe(steps=80, learning_rate=0.1)
    classifier = FewShotClassifier(folder, TEMPLATE, CHOICES, recipe=recipe).fit(TEXTS, LABELS)
    unseen = words.rows(40, seed=9)
    assert classifier.score([row["text"] for row in unseen], [row["label"] for row in unseen]) > 0.85
    found = classifier.predict_proba(TEXTS[:3])
    assert found.shape == (3, 2) and found.sum(axis=1) == pytest.approx(1)
    assert classifier.classes_.tolist() == ["neg", "pos"]
    assert classifier.predict(TEXTS[:2]).tolist() == ["pos", "neg"] == LABELS[:2]


def test_it_learns_what_the_trainer_learns_of_all_rows(make, folder, tmp_path):
    classifier = make(template=TEMPLATE, choices=CHOICES, random_state=3).fit(TEXTS, LABELS)
    classifier.save(tmp_path / "ours")
    base, tokenizer = load_base(str(folder))
    model = IA3Model(base, IA3Config(task_type="CAUSAL_LM"))
    task = Task(template=TEMPLATE, choices=CHOICES)
    arguments = QUICK.training_arguments(tmp_path / "run", seed=3, save_strategy="no", disable_tqdm=True)
    TFewTrainer(model, arguments, tokenizer, Member(task, ROWS), QUICK).train()
    model.save_pretrained(tmp_path / "trainers")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "trainers"))
    assert tiny.same_bits(found, expected)
    assert len(AdapterFolder(tmp_path / "ours").metrics["train_rows"]) == len(ROWS)


def test_the_seed_decides(make):
    def probabilities(seed):
        return make(random_state=seed).fit(TEXTS, LABELS).predict_proba(TEXTS)

    assert (probabilities(0) == probabilities(0)).all()
    assert (probabilities(0) != probabilities(1)).any()
    generators = [np.random.RandomState(5) for _ in range(2)]
    assert (probabilities(generators[0]) == probabilities(generators[1])).all()


@pytest.mark.parametrize("verbose", [False, True])
def test_fitting_is_quiet_and_leaves_the_global_generators_alone(make, verbose, capfd):
    make().fit(TEXTS, LABELS)
    capfd.readouterr()
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(7)
    np.random.seed(7)
    make(verbose=verbose).fit(TEXTS, LABELS)
    assert torch.rand(1) == expected[0] and np.random.rand() == expected[1]
    assert ("loss" in "".join(capfd.readouterr())) == verbose


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_other_families(name, tmp_path):
    if name == "t5":
        tiny.build("t5", vocab_size=len(words.VOCABULARY)).save_pretrained(tmp_path)
        words.closing().save_pretrained(tmp_path)
    else:
        tiny.classifier(vocab_size=len(words.VOCABULARY)).base_model.save_pretrained(tmp_path)
        words.enclosing().save_pretrained(tmp_path)
    first = FewShotClassifier(tmp_path, recipe=QUICK).fit(TEXTS, LABELS)
    expected = first.predict_proba(TEXTS)
    three = ["good", "bad", "fine"] * 10
    second = FewShotClassifier(tmp_path, recipe=QUICK).fit(TEXTS[:30], three)  # an encoder has another head for them
    assert second.predict_proba(TEXTS).shape == (32, 3)
    assert (first.predict_proba(TEXTS) == expected).all()
    first.save(tmp_path / "adapter")
    assert (FewShotClassifier.load(tmp_path / "adapter").predict_proba(TEXTS) == expected).all()


# Rows and labels.


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        np.array(LABELS),
        pandas.Series(LABELS, name="queue"),
        pandas.Series(LABELS, dtype="category"),
        [label == "pos" for label in LABELS],
        [2 if label == "pos" else 10 for label in LABELS],
        np.array([label == "pos" for label in LABELS], dtype=np.int32),
    ],
    ids=["texts", "array", "series", "categories", "bools", "ints", "int32"],
)
def test_labels_come_back_as_they_went_in(make, labels, tmp_path):
    answers = dict(zip(sorted(set(labels)), ("good tea", "bad tea"), strict=True))
    classifier = make(choices=answers).fit(TEXTS, labels)
    assert classifier.classes_.tolist() == sorted(set(labels))
    found = classifier.predict(TEXTS)
    assert set(found.tolist()) <= {*labels} and found.dtype.kind == np.asarray(labels).dtype.kind
    classifier.save(tmp_path)
    again = FewShotClassifier.load(tmp_path)
    assert again.classes_.tolist() == classifier.classes_.tolist()
    assert [type(each) for each in again.classes_.tolist()] == [type(each) for each in classifier.classes_.tolist()]
    assert again.predict(TEXTS).tolist() == found.tolist()
    assert (again.predict_proba(TEXTS) == classifier.predict_proba(TEXTS)).all()


def test_a_label_that_no_row_has_is_predicted_too(make):
    classifier = make(choices={0: "bad", 1: "good", 2: "fine"}).fit(TEXTS, [int(label == "pos") for label in LABELS])
    assert classifier.classes_.tolist() == [0, 1, 2]
    assert classifier.predict_proba(TEXTS).shape == (32, 3)


PAIRS = [{"first": text, "second": f"it is {label}"} for text, label in zip(TEXTS, LABELS, strict=True)]
FRAME = pandas.DataFrame(PAIRS)


@pytest.mark.parametrize(
    "rows",
    [PAIRS, FRAME, datasets.Dataset.from_list(PAIRS), FRAME.to_dict("list"), iter(PAIRS)],
    ids=["dictionaries", "frame", "data set", "columns", "iterator"],
)
def test_rows_of_several_columns(make, rows):
    classifier = make().fit(rows, pandas.Series(LABELS, name="sentiment"))
    assert classifier.task_.prompt(PAIRS[0]).startswith(f"first: {TEXTS[0]}\nsecond: it is pos\n")
    assert classifier.task_.label_column == "sentiment"
    assert (classifier.predict_proba(PAIRS) == classifier.predict_proba(FRAME)).all()


def test_an_array_has_columns_by_number_and_texts_may_stand_in_one(make):
    cells = FRAME.to_numpy()
    assert make().fit(cells, LABELS).task_.columns == ["x0", "x1"]
    classifier = make().fit(cells[:, :1], LABELS)
    assert classifier.task_.columns == ["text"]
    assert (classifier.predict_proba(cells[:, :1]) == make().fit(TEXTS, LABELS).predict_proba(np.array(TEXTS))).all()


def test_texts_are_a_templates_one_column(make):
    classifier = make(template="review : {{ message }} answer :").fit(pandas.Series(TEXTS), LABELS)
    assert classifier.task_.prompt({"message": "tea"}) == "review : tea answer :"
    frame = pandas.DataFrame({"message": TEXTS, "other": 1})
    warnings.simplefilter("error")
    assert (classifier.predict_proba(TEXTS) == classifier.predict_proba(frame)).all()


def test_an_empty_cell_is_no_error_where_others_are_full(make):
    frame = FRAME.copy()
    frame.loc[0, "second"] = None
    assert make().fit(frame, LABELS).predict(frame[:2]).shape == (2,)


def test_a_task_of_its_own(make, tmp_path):
    task = Task(templates=[TEMPLATE, "{{ text }} is it good ?"], choices=CHOICES, aliases={"p": "pos", "n": "neg"})
    task.save(tmp_path / "task.yaml")
    classifier = make(task=tmp_path / "task.yaml").fit(TEXTS, [label[0] for label in LABELS])
    assert classifier.task_ == task and classifier.classes_.tolist() == ["n", "p"]
    assert {*classifier.predict(TEXTS)} <= {"n", "p"}


# What scikit-learn does with estimators.


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A tiny model that reads the first digits of numbers: the checks' rows are numbers, and so are their labels."""
    made = tmp_path_factory.mktemp("digits")
    known = [*words.SPECIAL, *"0123456789.-", "one", "two", "three"]
    letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(known)}, unk_token="<unk>"))
    letters.normalizer = normalizers.Replace(Regex(r"(?<=\.\d)\d+|[^\w.-]+"), " ")
    letters.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\d|[.-]"), "isolated")]
    )
    special = dict(zip(("pad_token", "eos_token", "unk_token"), words.SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=letters, **special).save_pretrained(made)
    tiny.build("llama", vocab_size=len(known), max_position_embeddings=512).save_pretrained(made)
    return made


ROUNDED = "a row's scores differ in their last digits (float32) with the rows that go through the model beside it"
CANNOT_HOLD = {
    "check_methods_sample_order_invariance": ROUNDED,
    "check_methods_subset_invariance": ROUNDED,
    "check_classifier_data_not_an_array": "the names of a DataFrame's columns are in the prompt, and choose the wording",
}


@parametrize_with_checks([FewShotClassifier()], expected_failed_checks=lambda _: CANNOT_HOLD)
def test_the_checks_of_scikit_learn(estimator, check, digits):
    check(estimator.set_params(model=str(digits), recipe=Recipe(steps=1)))


def test_a_row_has_the_same_probabilities_beside_any_others_to_rounding(make):
    classifier = make().fit(TEXTS, LABELS)
    expected = classifier.predict_proba(TEXTS)
    alone = np.concatenate([classifier.predict_proba([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, expected, rtol=1e-5)
    np.testing.assert_allclose(classifier.predict_proba(TEXTS[::-1])[::-1], expected, rtol=1e-5)


def test_cross_validation_and_grid_search_load_one_base_model(make, folder, loads):
    forget()
    classifier = make(template=TEMPLATE)
    scores = cross_val_score(classifier, TEXTS, LABELS, cv=3)
    assert scores.shape == (3,) and not hasattr(classifier, "classes_")
    grid = {"recipe": [QUICK, QUICK.changed(steps=1)], "choices": [None, CHOICES]}
    search = GridSearchCV(classifier, grid, cv=2, error_score="raise").fit(TEXTS, LABELS)
    assert search.best_estimator_.predict(TEXTS[:2]).shape == (2,)
    assert loads == [str(folder)]


def test_a_pipeline(make):
    found = make_pipeline(FunctionTransformer(lambda texts: [text.lower() for text in texts]), make(template=TEMPLATE))
    upper = [text.upper() for text in TEXTS]
    expected = make(template=TEMPLATE).fit(TEXTS, LABELS).predict_proba(TEXTS)
    assert (found.fit(upper, LABELS).predict_proba(upper) == expected).all()


def test_tools_that_number_labels(make):
    numbered = make(choices={0: "bad", 1: "good"})
    found = cross_val_predict(numbered, TEXTS, LABELS, cv=2, method="predict_proba")
    assert found.shape == (32, 2)
    voting = VotingClassifier([("a", numbered), ("b", numbered)], voting="soft").fit(TEXTS, LABELS)
    assert {*voting.predict(TEXTS)} <= {"neg", "pos"}


def test_a_clone_learns_the_same(make):
    first = make(task=Task(template=TEMPLATE, choices=CHOICES)).fit(TEXTS, LABELS)
    again = clone(first)
    with pytest.raises(NotFittedError):
        again.predict(TEXTS)
    assert (again.fit(TEXTS, LABELS).predict_proba(TEXTS) == first.predict_proba(TEXTS)).all()


# One base model for all.


def test_classifiers_on_one_base_model_do_not_touch_each_other(make, loads):
    first = make().fit(TEXTS, LABELS)
    expected = first.predict_proba(TEXTS)
    loads.clear()
    second = make().fit(TEXTS, LABELS[::-1])
    assert first._base is second._base and not loads
    others = second.predict_proba(TEXTS)
    assert (others != expected).any()
    for _ in range(2):
        assert (first.predict_proba(TEXTS) == expected).all()
        assert (second.predict_proba(TEXTS) == others).all()


def test_a_fit_that_fails_spoils_nobody(make):
    first = make().fit(TEXTS, LABELS)
    expected = first.predict_proba(TEXTS)
    with pytest.raises(InputError, match="are the same to this model's tokenizer"):  # says the trainer
        make(choices={"pos": "unknown", "neg": "words"}).fit(TEXTS, LABELS)
    assert (first.predict_proba(TEXTS) == expected).all()


def test_threads(make):
    some = [make(random_state=seed).fit(TEXTS, LABELS) for seed in range(3)]
    expected = [each.predict_proba(TEXTS[:8]) for each in some]
    found = {}

    def ask(index):
        for turn in range(5):
            found[index, turn] = some[index].predict_proba(TEXTS[:8])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[index, turn] == expected[index]).all() for index in range(3) for turn in range(5))


def test_a_base_model_stays_in_memory_while_it_is_of_use(make, tmp_path):
    first = make().fit(TEXTS, LABELS)
    kept = weakref.ref(first._base)
    words.save_model(tmp_path / "other")
    other = make(model=tmp_path / "other").fit(TEXTS, LABELS)
    gc.collect()
    assert kept() is first._base  # a classifier has it
    first.predict(TEXTS[:1])
    del first
    gc.collect()
    assert kept() is None and other.predict(TEXTS[:1]).shape == (1,)


def test_the_one_used_last_makes_room_for_another(make, tmp_path, monkeypatch):
    forget()
    kept = weakref.ref(make().fit(TEXTS, LABELS)._base)
    gc.collect()
    assert kept() is not None  # the next fit of a cross-validation takes it
    load, there = ia3.adapter.pretrained.load_base, []

    def watched(*args):
        gc.collect()
        there.append(kept())
        return load(*args)

    monkeypatch.setattr("ia3.adapter.pretrained.load_base", watched)
    words.save_model(tmp_path)
    make(model=tmp_path).fit(TEXTS, LABELS)
    assert there == [None]


def test_a_base_model_that_changes_on_disk_is_loaded_again(tmp_path, loads):
    words.save_model(tmp_path)
    classifier = FewShotClassifier(tmp_path, recipe=QUICK)
    before = classifier.fit(TEXTS, LABELS).predict_proba(TEXTS)
    tiny.build("llama", seed=1, vocab_size=len(words.VOCABULARY)).save_pretrained(tmp_path)
    assert (classifier.fit(TEXTS, LABELS).predict_proba(TEXTS) != before).any()
    assert len(loads) == 2


# Storing.


def test_joblib_stores_the_adapter_and_not_the_base_model(make, folder, tmp_path, loads):
    classifier = make(choices={True: "good", False: "bad"}).fit(TEXTS, [label == "pos" for label in LABELS])
    expected, file = classifier.predict_proba(TEXTS), tmp_path / "classifier.joblib"
    joblib.dump(classifier, file)
    assert file.stat().st_size < (folder / "model.safetensors").stat().st_size / 4
    forget()
    del classifier
    loads.clear()
    again = joblib.load(file)
    assert (again.predict_proba(TEXTS) == expected).all() and again.predict(TEXTS).dtype == bool
    assert loads == [str(folder)]


def command(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    shown = capsys.readouterr()
    assert not ended.value.code, shown.err
    return json.loads(shown.out)


def test_every_command_takes_what_it_saves(make, tmp_path, capsys):
    classifier = make().fit(TEXTS, pandas.Series(LABELS, name="queue"))
    classifier.save(tmp_path / "adapter")
    found = command(capsys, "predict", tmp_path / "adapter", *TEXTS[:2])
    assert [item["label"] for item in found] == classifier.predict(TEXTS[:2]).tolist()
    assert [item["probabilities"]["pos"] for item in found] == classifier.predict_proba(TEXTS[:2])[:, 1].tolist()
    pandas.DataFrame({"text": TEXTS, "queue": LABELS}).to_csv(tmp_path / "rows.csv", index=False)
    found = command(capsys, "evaluate", tmp_path / "adapter", "--data", tmp_path / "rows.csv")
    assert found["accuracy"] == classifier.score(TEXTS, LABELS)


def test_it_loads_what_the_command_saves(folder, tmp_path, capsys):
    pandas.DataFrame({"message": TEXTS, "queue": [len(label) + (label == "pos") for label in LABELS]}).to_csv(
        tmp_path / "rows.csv", index=False
    )
    (tmp_path / "quick.yaml").write_text(QUICK.to_yaml())
    adapter = tmp_path / "adapter"
    options = ["--data", tmp_path / "rows.csv", "--label-column", "queue", "--recipe", tmp_path / "quick.yaml"]
    options += ["--folds", "2", "--template", "review : {{ message }} it is", "--choices", "3=bad,4=good"]
    command(capsys, "train", "--model", folder, *options, "--output", adapter)
    classifier = FewShotClassifier.load(adapter)
    assert classifier.classes_.tolist() == ["3", "4"] and classifier.recipe_ == Recipe.load(tmp_path / "quick.yaml")
    assert classifier.temperature_ == AdapterFolder(adapter).calibration.temperature != 1
    found = command(capsys, "predict", adapter, *TEXTS)
    probabilities = np.array([[item["probabilities"][label] for label in ("3", "4")] for item in found])
    np.testing.assert_allclose(classifier.predict_proba(TEXTS), probabilities, rtol=1e-6)

    classifier.save(tmp_path / "again")  # with all that the folder had
    for name in ("task.yaml", "recipe.yaml", "calibration.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()
    assert clone(classifier).fit(TEXTS, ["3", "4"] * 16).classes_.tolist() == ["3", "4"]


def test_loading_on_another_base_model(make, tmp_path):
    classifier = make().fit(TEXTS, LABELS)
    classifier.save(tmp_path / "adapter")
    words.save_model(tmp_path / "moved")
    found = FewShotClassifier.load(tmp_path / "adapter", model=tmp_path / "moved", dtype="float32")
    assert (found.predict_proba(TEXTS) == classifier.predict_proba(TEXTS)).all()
    assert found.get_params()["model"] == tmp_path / "moved"


# Bad input.


@pytest.mark.parametrize(
    "texts, labels, message",
    [
        (TEXTS, LABELS[:-1], "a label for each of the 32 rows, found 31"),
        (TEXTS[:2], ["pos", "pos"], "at least two classes, found one class, 'pos'"),
        ([*TEXTS[:2], " "], LABELS[:3], r"found it empty \(row 3\)"),
        ([*TEXTS[:2], float("nan")], LABELS[:3], r"found it empty \(row 3\)"),
        ([*TEXTS[:2], None], LABELS[:3], r"found it empty \(row 3\)"),
        (TEXTS[:3], ["pos", "neg", None], r"a label, found none \(row 3\)"),
        (TEXTS[:3], [1.0, 2.0, float("nan")], r"a label, found none \(row 3\)"),
        (TEXTS[:3], [0.5, 1.5, 2.5], "Unknown label type: continuous"),
        (TEXTS[:3], ["pos", 1, "neg"], "labels of one type, found 'int', 'str'"),
        (TEXTS[:2], ["pos ", "pos"], "one name for the label 'pos'|at least two labels"),
        ("one text", ["pos"], "the single text 'one text'; put a text into a list"),
        ([], [], "at least one row, found none"),
        (5, [1], "Expected rows|Expected 2D array"),
        (PAIRS[:2], pandas.Series(["a", "b"], name="first"), "without the column of their labels, 'first'; drop it"),
        ([{"text": "a"}, {"other": "b"}], ["pos", "neg"], "'other'"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_rows_and_labels_that_cannot_be_used(make, texts, labels, message):
    with pytest.raises(ValueError, match=message) as found:
        make().fit(texts, labels)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"model": 5}, "a name or a path as model, found 5"),
        ({"model": "./nothing-here"}, "found no './nothing-here' here"),
        ({"recipe": "fast"}, "a recipe of paper, small, sentence, generate or a YAML file, found 'fast'"),
        ({"dtype": "int8"}, "a dtype of .*, found 'int8'"),
        ({"template": "{{ text"}, "Cannot use the task"),
        ({"template": "{{ text }} {{ title }}"}, "the columns 'text', 'title'"),
        ({"choices": ["good", "bad"]}, "a dictionary, label → answer text, found"),
        ({"choices": {"pos": "good", "fine": "fine"}}, "a known label in 'label', found 'neg'"),
        ({"task": "rte", "template": "{{ text }}"}, "found both"),
        ({"task": "copa"}, "copa|columns"),
        ({"task": "no-such-task"}, "found 'no-such-task'"),
        ({"random_state": -1}, "Seed must be between 0 and"),
    ],
    ids=str,
)
def test_parameters_that_cannot_be_used(make, params, message):
    with pytest.raises(ValueError, match=message):
        make(**params).fit(TEXTS, LABELS)


def test_a_label_among_the_choices_that_cannot_be_of_ys_type(make):
    with pytest.raises(InputError, match=r"labels such as .* in y, found 'other' among the choices"):
        make(choices={1: "good", 0: "bad", "other": "fine"}).fit(TEXTS, [1, 0] * 16)


def test_what_is_asked_before_fitting_and_with_other_columns(make):
    for method in ("predict", "predict_proba", "save"):
        with pytest.raises(NotFittedError):
            getattr(make(), method)(TEXTS)
    classifier = make().fit(FRAME, LABELS)
    with pytest.raises(ValueError, match="feature names should match"):
        classifier.predict(FRAME.rename(columns={"first": "1st"}))
    with pytest.raises(InputError, match="a row with the columns 'first', 'second', found a text alone"):
        classifier.predict(TEXTS)
    with pytest.raises(InputError, match="The template names 'second'"):
        classifier.predict([{"first": "tea"}])
    with pytest.raises(InputError, match=r"found it empty \(row 2\)"):
        make().fit(TEXTS, LABELS).predict(["tea", ""])
    for empty in (None, float("nan")):  # as pandas reads an empty cell
        with pytest.raises(InputError, match=r"found it empty \(row 2\); fill the row, or leave it out"):
            make().fit(TEXTS, LABELS).predict(["tea", empty])
    with pytest.raises(InputError, match="found the same for all 6; let the template name a column"):
        make(template="about").fit(FRAME[:6], LABELS[:6])


def test_folders_that_hold_no_classifier(make, tmp_path):
    classifier = make().fit(TEXTS, LABELS)
    classifier.save(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "classes": ["pos"]}))
    with pytest.raises(InputError, match="the labels 'neg', 'pos' as 'classes' in metrics"):
        FewShotClassifier.load(tmp_path)
    (tmp_path / "task.yaml").write_text("template: '{{ text }}'\nchoices: '{{ endings }}'\n")
    with pytest.raises(InputError, match="answers differ from row to row"):
        FewShotClassifier.load(tmp_path)
    (tmp_path / "task.yaml").unlink()
    with pytest.raises(InputError, match="Expected a task"):
        FewShotClassifier.load(tmp_path)


class TestLabelSets:
    """Rows with several labels, as scikit-learn's indicator matrices say them."""

    names = ("neg", "pos", "tea")
    texts = tuple(
        f"the {'tea' if tea else 'soup'} was {' and '.join(['lovely'] * pos + ['awful'] * neg) or 'it'} {number}"
        for number, (neg, pos, tea) in enumerate(np.ndindex(2, 2, 2))
        for _ in range(3)
    )
    y = np.array([row for row in np.ndindex(2, 2, 2) for _ in range(3)])

    def recipe(self, **changes):
        return QUICK.changed(encoder="none", opinions="head", **changes)

    @pytest.mark.parametrize("kind", ["matrix", "lists", "frame", "sparse"])
    def test_it_learns_them(self, make, kind):
        y = {
            "matrix": self.y,
            "lists": self.y.tolist(),
            "frame": pandas.DataFrame(self.y, columns=["tea", "b", "a"]).astype(bool),
            "sparse": scipy.sparse.csr_matrix(self.y),
        }[kind]
        choices = None if kind == "frame" else {0: "bad", 1: "good", 2: "tea"}
        classifier = make(template=TEMPLATE, choices=choices, recipe=self.recipe()).fit(self.texts, y)
        assert classifier.classes_.tolist() == (["tea", "b", "a"] if kind == "frame" else [0, 1, 2])
        found, probabilities = classifier.predict(self.texts), classifier.predict_proba(self.texts)
        np.testing.assert_array_equal(found, self.y)
        assert found.dtype.kind == "i" and probabilities.shape == (24, 3)
        thresholds = [classifier.opinions_.thresholds[str(name)] for name in classifier.classes_]
        np.testing.assert_array_equal(probabilities >= thresholds, found)
        shifted = np.roll(self.y, 1, axis=0)
        assert classifier.score(self.texts, shifted) == accuracy_score(shifted, found) < 1

    def test_it_is_saved_and_loaded(self, make, tmp_path):
        y = pandas.DataFrame(self.y, columns=["tea", "b", "a"])
        classifier = make(template=TEMPLATE, recipe=self.recipe()).fit(self.texts, y)
        classifier.save(tmp_path / "saved")
        joblib.dump(classifier, tmp_path / "dumped")
        for again in (FewShotClassifier.load(tmp_path / "saved"), joblib.load(tmp_path / "dumped")):
            assert again.classes_.tolist() == ["tea", "b", "a"]
            np.testing.assert_array_equal(again.predict(self.texts), self.y)

    def test_vectors_with_answers(self, make):
        choices = {0: "bad", 1: "good", 2: "tea"}
        recipe = QUICK.changed(encoder="none", opinions="vectors")
        classifier = make(template=TEMPLATE, choices=choices, recipe=recipe).fit(self.texts, self.y)
        assert classifier.task_.choices == {"0": "bad", "1": "good", "2": "tea"}
        assert set(classifier.opinions_.weights) == {"vectors"} and classifier.predict(self.texts).shape == (24, 3)

    def test_a_task(self, make):
        for fields in ({}, {"label_columns": ["tea", "pos", "neg"]}):
            task = Task.create({"template": TEMPLATE, "choices": list(self.names), "multi_label": True, **fields})
            frame = pandas.DataFrame(self.y, columns=self.names)
            classifier = make(task=task, recipe=self.recipe()).fit(self.texts, frame)
            assert classifier.classes_.tolist() == [*self.names]
            np.testing.assert_array_equal(classifier.predict(self.texts), self.y)
        with pytest.raises(InputError, match="as columns of y, found 0, 1, 2"):
            make(task=task).fit(self.texts, self.y)
        with pytest.raises(InputError, match="Expected an indicator matrix as y for a multi-label task"):
            make(task=task).fit(self.texts, np.array(self.names * 8))

    @pytest.mark.parametrize(
        "y", [[["a"], ["a", "b"]] * 12, [["a", "b"], ["b", "c"]] * 12, [{"a"}, set()] * 12, [[0, 2], [1, 1]] * 12]
    )
    def test_no_matrix_of_indicators(self, make, y):
        with pytest.raises(InputError, match=r"make a matrix of lists of labels with sklearn\S+MultiLabelBinarizer"):
            make().fit(self.texts, y)

    def test_what_cannot_be_learned(self, make):
        with pytest.raises(InputError, match="Expected training rows with different labels, of at least two"):
            make().fit(self.texts, np.ones((24, 2)))
        with pytest.raises(InputError, match="Expected a label for each of the 24 rows, found 23"):
            make().fit(self.texts, self.y[1:])
        with pytest.raises(InputError, match="one label for each row with class_weight"):
            make(class_weight="balanced").fit(self.texts, self.y)


def test_a_base_with_a_device_map(tmp_path):
    words.save_model(tmp_path)
    rows = words.rows(16)
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    found = []
    for device_map in (None, "auto"):
        classifier = FewShotClassifier(tmp_path, words.TEMPLATE, recipe=Recipe(steps=2), device_map=device_map)
        classifier.fit(texts, labels).save(tmp_path / "saved")
        again = FewShotClassifier.load(tmp_path / "saved", device_map=device_map)
        found += [classifier.predict_proba(texts), again.predict_proba(texts)]
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, atol=1e-6)
