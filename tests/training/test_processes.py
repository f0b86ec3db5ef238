"""Several processes train what one would, to rounding; the first prints and writes."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ia3 import IA3Config, IA3Model, InputError, Member, Recipe, TFewTrainer
from ia3.cli import main
from ia3.processes import connect, dealt, from_first, sharded_by_launcher
from support import disagreeing, tiny, training, training_script, words
from support.launched import together as launched
from support.paths import TESTS


def test_the_vectors_are_those_of_one_process(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    training_script.main(alone)
    launched(tmp_path, training_script.main, together, str(alone / "several/checkpoint-4"), processes=2)
    mine, theirs = torch.load(alone / "found.pt"), torch.load(together / "found.pt")
    for name, vectors in mine.items():
        for key, value in vectors.items():
            torch.testing.assert_close(theirs[name][key], value, atol=2e-6, rtol=0, msg=f"{name}, {key}")
    # One process began, two went on, with the whole model each or with shares of it; and the other way round.
    again = [
        training_script.trained(alone, "question", ["one", "two", "three"], str(together / f"{name}/checkpoint-4"))
        for name in ("several", "several_shares")
    ]
    for found in (theirs["resumed"], theirs["resumed in shares"], *again):
        for key, value in mine["several"].items():
            if key != "loss":  # of the steps since
                torch.testing.assert_close(found[key], value, atol=2e-6, rtol=0, msg=key)


def test_the_command_of_the_docs_gives_what_one_process_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words.save_model(tmp_path / "model")
    rows = [{"message": row["text"], "category": row["label"]} for row in words.different(40, seed=2)]
    words.write_csv(tmp_path / "train.csv", rows)
    page = (TESTS.parent / "docs" / "processes.md").read_text(encoding="utf-8")
    [command] = re.findall(r"^torchrun --nproc_per_node 2 -m ia3 (.+)$", page, re.MULTILINE)
    command = f"{command} --model model --encoder none --dtype float32 --examples-per-label 8 --json".split()
    with pytest.raises(SystemExit) as ended:
        main([part.replace("shared", "alone") for part in command])
    assert not ended.value.code
    alone = json.loads(capsys.readouterr().out)
    one, two = (Path("adapters", name) for name in ("alone", "shared"))
    for more in ([], ["--device-map", "shards"]):
        together = json.loads(launched(tmp_path, main, [*command, *more], processes=2))  # printed once
        assert_same_vectors(one, two)
        assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
        for key in ("zero_shot", "trained", "cross_validation"):
            assert together[key] == pytest.approx(alone[key])


def test_pretraining_in_processes_gives_what_one_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words.save_model(tmp_path / "model")
    for name, rows in (("teas", words.rows(30)), ("soups", words.rows(10, seed=1))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        training_script.TASK.changed(name=name, train=f"{name}.jsonl").save(tmp_path / f"{name}.yaml")
    command = ["pretrain", "--tasks", "teas.yaml,soups.yaml", "--model", "model", "--dtype", "float32", "--steps", "8"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--output", "alone", "--json"])
    assert not ended.value.code
    alone = json.loads(capsys.readouterr().out)
    together = json.loads(
        launched(tmp_path, main, [*command, "--output", "shared", "--json", "--device-map", "shards"], processes=2)
    )
    assert_same_vectors(tmp_path / "alone", tmp_path / "shared")
    assert together["tasks"] == alone["tasks"] and together["train_loss"] == pytest.approx(alone["train_loss"])


def assert_same_vectors(one, two):
    vectors = load_file(two / "adapter_model.safetensors")
    for key, value in load_file(one / "adapter_model.safetensors").items():
        torch.testing.assert_close(vectors[key], value, atol=2e-6, rtol=0)


def test_what_a_launcher_cannot_start(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        main(["predict", "adapters/x", "some text"])
    assert ended.value.code == 2
    assert "Expected one process" in capsys.readouterr().err
    with pytest.raises(InputError, match="a batch_size that 2 processes can share evenly, found 5"):
        Recipe(batch_size=5).training_arguments("run")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_launchers_that_divide_models_in_other_ways(settings, found, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    sharded_by_launcher.cache_clear()
    with pytest.raises(InputError, match=f"FSDP 2 .* to divide a base model among processes, found {found};"):
        sharded_by_launcher()


def test_what_a_launcher_says_of_shares_is_taken_from_accelerate(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    sharded_by_launcher.cache_clear()
    assert sharded_by_launcher() and "ACCELERATE_USE_FSDP" not in os.environ
    assert sharded_by_launcher()
    sharded_by_launcher.cache_clear()
    assert not sharded_by_launcher()


def test_arguments_that_divide_models_in_other_ways(tmp_path):
    for options, found in (
        ({"fsdp": True}, "Expected several processes for FSDP"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "found fsdp_version 1"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "found fsdp_config cpu_offload"),
    ):
        with pytest.raises(InputError, match=found):
            training.trainer(tmp_path, args=options)
    arguments = Recipe().training_arguments(tmp_path)
    arguments.deepspeed = {"zero_optimization": {"stage": 3}}  # which asks for its package when given
    model = IA3Model(tiny.build("llama"), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="found DeepSpeed"):
        TFewTrainer(model, arguments, words.tokenizer(), Member(training_script.TASK, words.rows(8)))


def test_only_the_first_prints(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        main(["predict", "adapters/x", "some text"])
    found = capsys.readouterr()
    assert ended.value.code == 2 and not found.out + found.err


def test_what_a_launcher_must_set(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        InputError, match=r"MASTER_ADDR.* beside WORLD_SIZE=2, found none; start the processes by torchrun"
    ):
        connect({})
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="Expected the number of processes in WORLD_SIZE, found 'many'"):
        connect({})


def test_one_process_works_alone():
    connect({"seed": 0})
    assert from_first(lambda: "found") == "found"
    assert dealt(3, lambda indices: [index * 2 for index in indices]) == [0, 2, 4]


def test_processes_that_disagree_are_told(tmp_path):
    out = launched(tmp_path, disagreeing.main, processes=2)
    assert out.count("Expected 2 processes with the same data, task, recipe and seed, found others in process 1") == 2
