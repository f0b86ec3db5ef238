"""The recipe learns; checkpoints hold adapters only; a resumed run ends where an uninterrupted one does."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

from ia3 import IA3Model, InputError, Recipe, predict
from ia3.trainer import Trainer, last_checkpoint
from support import tiny, words
from support.paths import TESTS
from support.training import TASK, trainer


def test_loss_falls_and_only_vectors_change(tmp_path):
    run = trainer(tmp_path, steps=60, args={"learning_rate": 0.05})
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    changed = {key for key, value in run.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(".ia3_l." in key for key in changed)
    rows = words.rows(20, seed=9)
    found = [p.label for p in predict(run.model, words.tokenizer(), TASK, rows)]
    assert TASK.metrics([row["label"] for row in rows], found)["accuracy"] > 0.9


def test_a_base_in_bfloat16_teaches_vectors_in_float32_the_same_to_rounding(tmp_path):
    runs = [trainer(tmp_path, steps=10, args={"learning_rate": 0.05}) for _ in range(2)]
    runs[1].model.get_base_model().to(torch.bfloat16)
    for vector in runs[1].model.adapter_parameters("default"):
        vector.data = vector.data.float()
    moved = []
    for run in runs:
        run.train()
        vectors = list(run.model.adapter_parameters("default"))
        assert all(vector.dtype == torch.float32 for vector in vectors)
        moved.append(torch.cat([vector.detach().flatten() - 1 for vector in vectors]))
    assert torch.cosine_similarity(*moved, dim=0) > 0.98


def test_optimizer_and_schedule_are_the_papers(tmp_path):
    run = trainer(tmp_path, steps=100)
    run.create_optimizer_and_scheduler(100)
    assert type(run.optimizer).__name__ == "Adafactor"
    assert run.args.per_device_train_batch_size == 8
    rates = []
    for _ in range(100):
        rates.append(run.lr_scheduler.get_last_lr()[0])
        run.optimizer.step()
        run.lr_scheduler.step()
    assert max(rates) == pytest.approx(3e-3) and rates.index(max(rates)) == 6
    assert rates[53] == pytest.approx(1.5e-3) and rates[99] == pytest.approx(3e-3 / 94)


def test_gradient_accumulation_is_the_larger_batch(tmp_path):
    whole = trainer(tmp_path, steps=4, args={"per_device_train_batch_size": 8})
    parts = trainer(tmp_path, steps=4, args={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    whole.train()
    parts.train()
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_resuming_ends_where_an_uninterrupted_run_does(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer(tmp_path / "whole", args=args)
    whole.train()

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    cut = trainer(tmp_path / "cut", args=args, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    checkpoint = last_checkpoint(tmp_path / "cut")
    assert checkpoint.endswith("checkpoint-5")
    resumed = trainer(tmp_path / "cut", args=args)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 12
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_that_was_cut_short_does_not_count(tmp_path):
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path).endswith("checkpoint-5")
    (tmp_path / "checkpoint-10" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path).endswith("checkpoint-5")


def test_checkpoints_hold_adapters_only(tmp_path):
    run = trainer(tmp_path, steps=2, args={"save_strategy": "steps", "save_steps": 2})
    run.train()
    files = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(files)
    assert not {"model.safetensors", "pytorch_model.bin"} & set(files)


def test_a_wrapper_for_parallel_training_is_seen_through(tmp_path):
    class Parallel(torch.nn.Module):  # as DistributedDataParallel looks from outside
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    run = trainer(tmp_path)
    wrapped = run.scorer.through(Parallel(run.model))
    batch = wrapped.collate([example.questions[0] for example in run.train_dataset[:3]])
    assert "position_ids" in batch
    assert torch.equal(wrapped.log_probs(batch), run.scorer.log_probs(batch))


def test_other_devices_in_sight_change_nothing(tmp_path, monkeypatch):
    runs = [trainer(tmp_path, steps=3)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # what makes `Trainer` use nn.DataParallel
    options = Recipe(steps=3).training_arguments(tmp_path, save_strategy="no", disable_tqdm=True)
    assert options.n_gpu == 2
    runs.append(trainer(tmp_path, steps=3))
    for run in runs:
        run.train()
        assert run.model_wrapped is run.model and run.args.train_batch_size == 8
    one, two = (torch.cat([vector.flatten() for vector in run.model.adapter_parameters("default")]) for run in runs)
    assert torch.equal(one, two) and not torch.equal(one, torch.ones_like(one))


def test_evaluate_gives_loss_and_the_tasks_metrics(tmp_path):
    run = trainer(tmp_path, eval_rows=words.rows(10, seed=5))
    found = run.evaluate()
    predicted = [p.label for p in predict(run.model, words.tokenizer(), TASK, words.rows(10, seed=5))]
    expected = TASK.metrics([row["label"] for row in words.rows(10, seed=5)], predicted)
    assert {key: found[f"eval_{key}"] for key in expected} == expected
    assert found["eval_loss"] > 0


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "tea", "label": "pos"}] * 4, "at least two labels, found only 'pos'"),
        ([{"text": "tea", "label": "maybe"}], "found 'maybe'"),
        ([{"text": "", "label": "pos"}], "row 1"),
        ([], "found only none in 0 rows"),
    ],
)
def test_rows_that_cannot_be_learned_from(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, rows=rows)


class TestTrainer:
    """`ia3.trainer.Trainer` in place of transformers', as in a PEFT script."""

    def run(self, folder, name="gpt2", **options):
        model = tiny.adapt(name, __import__("ia3"), seed=None)
        data = [
            dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True), unused="text")
            for row in zip(*(v.tolist() for v in tiny.batch(name, rows=8).values()), strict=True)
        ]
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            report_to="none",
            disable_tqdm=True,
            learning_rate=0.05,
            **options,
        )
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data)

    def test_trains_evaluates_and_saves_adapters_only(self, tmp_path):
        run = self.run(tmp_path)
        run.train()
        losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
        assert losses[-1] < losses[0]
        run.save_model(tmp_path / "final")
        assert sorted(p.name for p in (tmp_path / "final").iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "training_args.bin",
        ]

    def test_takes_the_best_model_back(self, tmp_path):
        run = self.run(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
        run.train()
        best = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["best_model_checkpoint"]
        other = IA3Model.from_pretrained(tiny.build("gpt2"), best)
        for a, b in zip(
            tiny.adapter_parameters(run.model).values(), tiny.adapter_parameters(other).values(), strict=True
        ):
            assert torch.equal(a, b)

    def test_other_models_are_as_ever(self, tmp_path):
        model = tiny.build("llama")
        assert Trainer(model, transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none")).model is model


_TWO = """
import sys
import torch
sys.path.insert(0, {tests!r})
from support import words
from support.training import trainer
torch.set_num_threads(1)
rows = words.rows(32)
for number, row in enumerate(rows):
    row["text"] += " the tea was good and the soup was not" * (number % 7)
run = trainer({folder!r}, steps=3, rows=rows, args={{"per_device_train_batch_size": 4, "use_cpu": True}})
run.train()
vectors = torch.cat([vector.detach().flatten() for vector in run.model.adapter_parameters("default")])
torch.save(vectors, {folder!r} + f"/{{run.args.process_index}}.pt")
"""


@pytest.mark.slow
def test_two_processes_pass_through_the_model_equally_often(tmp_path):
    """Rows of very different lengths, which one process would divide into several passes."""
    script = tmp_path / "two.py"
    script.write_text(_TWO.format(tests=str(TESTS), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second) and not torch.equal(first, torch.ones_like(first))
