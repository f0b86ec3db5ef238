"""`ia3 predict --all-adapters`: many adapters answer each row, as each does alone, and texts are read once."""

import csv
import json
import shutil

import pytest

from ia3 import IA3Model, InputError, Task, load_base, predict
from ia3.answering import load_bank
from ia3.cli import main
from ia3.evaluation import prediction
from ia3.evaluation.calibration import Calibration
from ia3.evaluation.prediction import Respondent, predict_each
from ia3.folder import AdapterFolder
from ia3.scoring import readings
from ia3.scoring.readings import Readings
from support import words

ASKING, NAMES = ("soups", "teas/seed-0", "teas/seed-1"), ["soups", "starting", "teas/seed-0", "teas/seed-1"]
ROWS = [{"text": f"{row['text']} and it was fresh {number}"} for number, row in enumerate(words.rows(6, seed=3))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, and in `all` adapters of two tasks: one acts from the start of a text, the others from the question."""
    folder = tmp_path_factory.mktemp("place")
    words.save_model(folder / "model")
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, words.rows(40))))
    shared = {"template": "review : {{ text }} answer :", "train": "train.jsonl"}
    Task(name="teas", choices={"pos": "good", "neg": "not good"}, **shared).save(folder / "teas.yaml")
    Task(name="soups", choices={"warm": "fine", "cold": "bad"}, aliases={"pos": "warm", "neg": "cold"}, **shared).save(
        folder / "soups.yaml"
    )
    for task, output, options in (
        ("teas", "all/teas", ["--seeds", "0,1"]),
        ("soups", "all/soups", []),
        ("teas", "all/starting", ["--acts-from", "start"]),
    ):
        arguments = ["train", "--model", folder / "model", "--task", folder / f"{task}.yaml", "--test-rows", "1"]
        arguments += ["--steps", "6", "--output", folder / output, *options]
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert not ended.value.code
    quality = dict.fromkeys(("log_loss", "log_loss_before", "calibration_error", "calibration_error_before"), 0.1)
    AdapterFolder(folder / "all" / "soups").calibrate(Calibration(temperature=0.5, rows=9, **quality))
    recipe = folder / "all/teas/seed-1/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("length_normalization: 1.0", "length_normalization: 0.5"))
    assert AdapterFolder(recipe.parent).recipe.length_normalization == 0.5
    assert {name: AdapterFolder(folder / "all" / name).config.acts_from for name in NAMES} == {
        **dict.fromkeys(ASKING, "question"),
        "starting": "start",
    }
    words.write_csv(folder / "rows.csv", [{"id": str(i), **row} for i, row in enumerate(ROWS)])
    return folder


@pytest.fixture(scope="module")
def alone(place):
    """What each adapter says alone, and what the untrained model says in its task."""
    found = {}
    for name in NAMES:
        folder = AdapterFolder(place / "all" / name)
        base, tokenizer = load_base(str(place / "model"))
        task, recipe = folder.required_task(), folder.recipe
        untrained = predict(base, tokenizer, task, ROWS, recipe=recipe)
        model = IA3Model.from_pretrained(base, folder)
        adapted = predict(
            model, tokenizer, task, ROWS, recipe=recipe, temperature=folder.temperature, opinions=folder.opinions
        )
        found[name] = adapted, untrained
    return found


def check(found, items):
    """Labels and probabilities of JSON."""
    for one, item in zip(found, items, strict=True):
        assert one["label"] == item.label and list(one["probabilities"]) == list(item.probabilities)
        assert one["probabilities"] == pytest.approx(item.probabilities, abs=1e-5)


def test_each_row_gets_every_adapters_answer(ia3, place, alone):
    code, out, err = ia3("predict", place / "all", "--data", place / "rows.csv", "--all-adapters", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [list(row) for row in found] == [["adapters"]] * len(ROWS)
    assert [list(row["adapters"]) for row in found] == [NAMES] * len(ROWS)
    for name in NAMES:
        check([row["adapters"][name] for row in found], alone[name][0])
    assert len({json.dumps(row["adapters"]["soups"]) for row in found}) == len(ROWS)


@pytest.mark.parametrize("listed", ["teas/seed-1,soups", " soups , teas/seed-1,soups"])
def test_some_adapters_with_the_untrained_model_beside_them(ia3, place, alone, listed):
    options = ("--data", place / "rows.csv", "--adapters", listed, "--zero-shot", "--json")
    code, out, err = ia3("predict", place / "all", *options)
    assert code == 0, err
    found = json.loads(out)
    assert list(found[0]["adapters"]) == list(dict.fromkeys(name.strip() for name in listed.split(",")))
    for name in ("soups", "teas/seed-1"):
        check([row["adapters"][name] for row in found], alone[name][0])
        check([row["adapters"][name]["zero_shot"] for row in found], alone[name][1])


def test_files_have_columns_of_each_adapter(ia3, place, alone, tmp_path):
    for name in ("out.csv", "out.jsonl"):
        options = ("--data", place / "rows.csv", "--all-adapters", "--zero-shot", "--output", tmp_path / name)
        code, _, err = ia3("predict", place / "all", *options)
        assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    first = ["prediction", "probability_warm", "probability_cold"]
    first += [f"zero_shot_{column}" for column in first]
    assert list(rows[0])[:8] == ["id", "text", *(f"soups {column}" for column in first)]
    assert list(lines[0]) == ["id", "text", "adapters"]
    for name in NAMES:
        for start, which in (("", 0), ("zero_shot_", 1)):
            for row, line, item in zip(rows, lines, alone[name][which], strict=True):
                its = line["adapters"][name]["zero_shot"] if start else line["adapters"][name]
                assert row[f"{name} {start}prediction"] == its["label"] == item.label
                for label, value in item.probabilities.items():
                    assert float(row[f"{name} {start}probability_{label}"]) == pytest.approx(value, abs=1e-5)
                    assert its["probabilities"][label] == pytest.approx(value, abs=1e-5)


def test_a_file_that_was_written_is_written_anew(ia3, place, tmp_path):
    shutil.copy(place / "rows.csv", tmp_path / "rows.csv")
    for _ in range(2):
        options = ("--data", tmp_path / "rows.csv", "--all-adapters", "--output", tmp_path / "rows.csv")
        assert ia3("predict", place / "all", *options)[0] == 0
        columns = next(csv.reader((tmp_path / "rows.csv").open()))
        assert len(columns) == len(set(columns)) == 2 + 3 * len(NAMES)


def test_texts_make_a_table(ia3, place, alone):
    code, out, err = ia3("predict", place / "all", ROWS[0]["text"], "--all-adapters", "--zero-shot")
    assert code == 0, err
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in out.splitlines() if "│" in line]
    assert [cells[0] for cells in lines] == NAMES
    for cells in lines:
        item, untrained = (items[0] for items in alone[cells[0]])
        assert cells[1:3] == [ROWS[0]["text"], item.label]
        assert float(cells[3].rstrip("%")) == pytest.approx(100 * item.probabilities[item.best], abs=0.11)
        label, value = cells[4].split()
        assert label == untrained.label
        assert float(value.rstrip("%")) == pytest.approx(100 * untrained.probabilities[untrained.best], abs=0.11)


def test_tasks_may_call_their_only_column_otherwise(ia3, place, alone, tmp_path):
    shutil.copytree(place / "all", tmp_path / "all")
    path = tmp_path / "all/soups/task.yaml"
    path.write_text(path.read_text().replace("{{ text }}", "{{ message }}"))
    texts = [row["text"] for row in ROWS]
    code, out, err = ia3("predict", tmp_path / "all", *texts, "--all-adapters", "--json")
    assert code == 0, err
    for name in NAMES:
        check([row["adapters"][name] for row in json.loads(out)], alone[name][0])


def test_the_untrained_model_beside_one_adapter_and_beside_each_rows_own(ia3, place, alone, tmp_path):
    data = ("--data", place / "rows.csv", "--zero-shot")
    code, out, err = ia3("predict", place / "all" / "soups", *data, "--json")
    assert code == 0, err
    check(json.loads(out), alone["soups"][0])
    check([item["zero_shot"] for item in json.loads(out)], alone["soups"][1])
    owners = [NAMES[number % len(NAMES)] for number in range(len(ROWS))]
    path = words.write_csv(tmp_path / "mixed.csv", [{"who": who, **row} for who, row in zip(owners, ROWS, strict=True)])
    options = ("--data", path, "--adapter-column", "who", "--zero-shot")
    found = json.loads(ia3("predict", place / "all", *options, "--json")[1])
    assert [item["adapter"] for item in found] == owners
    check(found, [alone[who][0][i] for i, who in enumerate(owners)])
    check([item["zero_shot"] for item in found], [alone[who][1][i] for i, who in enumerate(owners)])
    assert ia3("predict", place / "all", *options, "--output", tmp_path / "out.csv")[0] == 0
    for row, item in zip(csv.DictReader((tmp_path / "out.csv").open()), found, strict=True):
        assert row["zero_shot_prediction"] == item["zero_shot"]["label"] and row["prediction"] == item["label"]


def spied(monkeypatch) -> list[int]:
    """How many texts each pass from now on reads."""
    found, read = [], readings.read_texts

    def reading(family, texts):
        found.append(len(texts))
        return read(family, texts)

    monkeypatch.setattr(readings, "read_texts", reading)
    return found


def everyone(place):
    folders = {name: AdapterFolder(place / "all" / name) for name in NAMES}
    model, tokenizer = load_bank(folders, None, "auto")
    return (
        model,
        tokenizer,
        [
            Respondent(name, its.required_task(), its.recipe, its.temperature, its.opinions)
            for name, its in folders.items()
        ],
    )


@pytest.mark.parametrize("at_once", [4096, 5])
def test_each_text_is_read_once(place, alone, monkeypatch, at_once):
    monkeypatch.setattr(prediction, "_AT_ONCE", at_once)
    model, tokenizer, asked = everyone(place)
    kept, done = Readings("1MB"), []
    predict_each(model, tokenizer, ROWS[:1], [asked], readings=kept)
    kept.clear()
    before, passes = kept.read, spied(monkeypatch)
    found = predict_each(model, tokenizer, ROWS, [asked] * len(ROWS), done.extend, readings=kept)
    assert kept.read - before == len(ROWS)
    assert sorted(done) == sorted(list(range(len(ROWS))) * len(NAMES))
    assert len(passes) < len(ROWS) or at_once == 5
    for i, name in enumerate(NAMES):
        for row, item in zip(found, alone[name][0], strict=True):
            assert row[i].label == item.label
            assert row[i].probabilities == pytest.approx(item.probabilities, abs=1e-5)


def test_errors_of_the_function_name_row_and_adapter(place):
    model, tokenizer, asked = everyone(place)
    with pytest.raises(InputError, match=r"Adapter 'soups': .*'text'.* \(row 2\)"):
        predict_each(model, tokenizer, [ROWS[0], {"other": "a"}], [asked] * 2)
    with pytest.raises(InputError, match="respondents for each of the 2 rows, found 1"):
        predict_each(model, tokenizer, ROWS[:2], [asked])
    with pytest.raises(InputError, match="'nobody'"):
        predict_each(model, tokenizer, ROWS[:1], [[Respondent("nobody", asked[0].task)]])
    assert predict_each(model, tokenizer, [], []) == []


ALL = ("--all-adapters",)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (None, ("--adapters", "soups,sops"), "found 'sops'; close to it: 'soups'"),
        (None, ("--adapters", ""), "Expected --adapters as names with commas between them, found ''; there are 'soups'"),
        (None, ("--adapters", "soups,"), "Expected --adapters as names with commas between them, found 'soups,'"),
        (None, (*ALL, "--adapters", "soups"), "Expected one of --adapter-column, --adapters and --all-adapters"),
        (None, (*ALL, "--adapter-column", "id"), "Expected one of --adapter-column, --adapters and --all-adapters"),
        (None, (*ALL, "--memory", "much"), "memory"),
        (lambda f: (f / "all/soups/task.yaml").unlink(), ALL, "Expected a task.yaml beside the adapter"),
        (lambda f: shutil.rmtree(f / "all"), ALL, "Expected a folder of adapters with --all-adapters"),
        (lambda f: (shutil.rmtree(f / "all"), (f / "all").mkdir()), ALL, "as --all-adapters asks for them"),
        (
            lambda f: (f / "rows.csv").write_text((f / "rows.csv").read_text().replace("text", "message")),
            ALL,
            "Adapter 'soups': The template names 'text', but the columns are 'id', 'message' (row 1)",
        ),
        (
            lambda f: (f / "rows.csv").write_text("id,text\n1,tea\n2, \n"),
            ALL,
            "Adapter 'soups': Expected some text in 'text', found it empty (row 2)",
        ),
        (lambda f: (f / "all/soups/adapter_model.safetensors").write_bytes(b"short"), ALL, "soups"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(ia3, place, tmp_path, spoil, options, message):
    for name in ("all", "rows.csv"):
        (shutil.copytree if name == "all" else shutil.copy)(place / name, tmp_path / name)
    if spoil is not None:
        spoil(tmp_path)
    output = tmp_path / "out.csv"
    code, _, err = ia3("predict", tmp_path / "all", "--data", tmp_path / "rows.csv", *options, "--output", output)
    assert code == 2 and len(err.strip().splitlines()) == 1 and message in err, err
    assert not output.exists()


def test_texts_are_for_tasks_of_one_column(ia3, place, tmp_path):
    shutil.copytree(place / "all", tmp_path / "all")
    path = tmp_path / "all/starting/task.yaml"
    path.write_text(path.read_text().replace("{{ text }}", "{{ text }} {{ more }}"))
    code, _, err = ia3("predict", tmp_path / "all", "some text", "--all-adapters")
    assert code == 2 and "Adapter 'starting': Expected rows with the columns 'more', 'text', found texts alone" in err
