"""transformers' and TRL's own trainers and pipelines take our models as they take PEFT's; ours do so without PEFT."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import ModelCard

import ia3
import ia3.trainer
from support import tiny, words

try:
    import peft
except ImportError:  # in the interpreter that `test_all_this_without_peft` starts
    peft = None

with_peft = pytest.mark.skipif(peft is None, reason="without PEFT")

OURS, THEIRS = ia3.trainer, transformers
# transformers' own trainers resume from adapters only where PEFT is installed.
TRAINERS = pytest.mark.parametrize(
    "trainers", [OURS, pytest.param(THEIRS, marks=with_peft)], ids=["ours", "transformers"]
)

CHECKPOINT = {"README.md", "adapter_config.json", "adapter_model.safetensors", "training_args.bin"}
STATE = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}


def whisper() -> torch.nn.Module:
    sizes = {key: value for key, value in tiny.SIZES["bart"].items() if key not in ("max_position_embeddings",)}
    lengths = {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}
    config = transformers.WhisperConfig(
        vocab_size=tiny.VOCAB,
        pad_token_id=tiny.PAD,
        eos_token_id=tiny.EOS,
        bos_token_id=tiny.BOS,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sizes,
        **lengths,
    )
    return tiny.randomized(transformers.WhisperForConditionalGeneration(config), 0.1)


def adapted(name: str, library: Any = ia3, **fields: Any) -> Any:
    """A tiny model with an adapter of ones."""
    if name != "whisper":
        return tiny.adapt(name, library, seed=None, **fields)
    targets = {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}
    return library.get_peft_model(whisper(), library.IA3Config(**targets, **fields))


def dataset(name: str) -> datasets.Dataset:
    """Rows as users have them: the model's columns, labels by a name that the collator knows, and one too many."""
    columns = tiny.batch("t5" if name == "whisper" else name, rows=8)
    if name == "bert":
        columns["label"] = columns.pop("labels")
        columns["token_type_ids"] = torch.arange(columns["input_ids"].numel()).view_as(columns["input_ids"]) % 2
    if name == "whisper":
        features = torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(0))
        columns = {"input_features": features, "labels": columns["labels"]}
    return datasets.Dataset.from_dict({key: value.tolist() for key, value in columns.items()} | {"text": ["a"] * 8})


BATCH = {
    "llama": {"input_ids", "attention_mask", "labels"},
    "bert": {"input_ids", "attention_mask", "token_type_ids", "labels"},
    "t5": {"input_ids", "attention_mask", "labels"},
    "whisper": {"input_features", "labels"},
}


def options(kind: type, folder: Path, **more: Any) -> Any:
    """Arguments of four steps, with a checkpoint after the second and the fourth."""
    fixed = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "logging_steps": 1, "eval_strategy": "steps"}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return kind(output_dir=str(folder), per_device_train_batch_size=2, learning_rate=0.05, **{**fixed, **quiet, **more})


def trainer(trainers: Any, name: str, folder: Path, model: Any = None, **more: Any) -> transformers.Trainer:
    data = dataset(name)
    model = adapted(name) if model is None else model
    if name in ("t5", "whisper"):
        made = options(
            transformers.Seq2SeqTrainingArguments,
            folder,
            predict_with_generate=True,
            generation_max_length=6,
            **more,
        )
        measure = {"compute_metrics": lambda found: {"tokens": float(found.predictions.max())}}
        return trainers.Seq2SeqTrainer(model, made, train_dataset=data, eval_dataset=data, **measure)
    made = options(transformers.TrainingArguments, folder, **more)
    return trainers.Trainer(model, made, train_dataset=data, eval_dataset=data)


def vectors(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    """What training changes, by the names in a checkpoint."""
    return {key: value.clone() for key, value in ia3.get_peft_model_state_dict(model, adapter_name=adapter).items()}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@TRAINERS
@pytest.mark.parametrize("name", BATCH)
def test_train_save_take_the_best_and_resume(trainers, name, tmp_path):
    whole = trainer(
        trainers,
        name,
        tmp_path / "whole",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first checkpoint, so that the last one cannot pass for it
    )
    assert set(next(iter(whole.get_train_dataloader()))) == BATCH[name]
    assert whole.label_names == ["labels"] and whole.can_return_loss is False
    whole.train()
    second, fourth = (tmp_path / "whole" / f"checkpoint-{step}" for step in (2, 4))
    for folder in (second, fourth):
        assert {path.name for path in folder.iterdir()} == CHECKPOINT | STATE
    assert not same(saved(second), saved(fourth))
    assert Path(whole.state.best_model_checkpoint) == second
    assert same(vectors(whole.model), saved(second))
    whole.save_model(tmp_path / "final")
    assert {path.name for path in (tmp_path / "final").iterdir()} == CHECKPOINT

    resumed = trainer(trainers, name, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(second))
    assert resumed.state.global_step == 4
    assert same(vectors(resumed.model), saved(fourth))
    if name in ("t5", "whisper"):
        assert 0 <= resumed.evaluate()["eval_tokens"] < tiny.VOCAB
        assert resumed.predict(dataset(name)).predictions.shape[0] == 8


@with_peft
@pytest.mark.parametrize("trainers", [OURS, THEIRS], ids=["ours", "transformers"])
@pytest.mark.parametrize("name", BATCH)
def test_losses_are_those_of_pefts_model(trainers, name, tmp_path):
    losses = []
    for side, library in ((trainers, ia3), (THEIRS, peft)):
        run = trainer(side, name, tmp_path / library.__name__, adapted(name, library), save_strategy="no")
        run.train()
        losses.append([entry[key] for entry in run.state.log_history for key in ("loss", "eval_loss") if key in entry])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][-1]


@with_peft
def test_whisper_trains_as_a_sequence_to_sequence_model_too(tmp_path):
    """PEFT's class for that task insists on input_ids."""
    run = trainer(THEIRS, "whisper", tmp_path, adapted("whisper", task_type="SEQ_2_SEQ_LM"))
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert losses[1] < losses[0]


def test_an_adapter_of_another_name_comes_back(tmp_path):
    """And that of an `IA3Model`, without the façade."""
    fresh = lambda: tiny.adapt("llama", ia3, "mine", seed=None).base_model  # noqa: E731
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    whole = trainer(OURS, "llama", tmp_path, fresh(), **worst)
    whole.train()
    second, fourth = (tmp_path / f"checkpoint-{step}" for step in (2, 4))
    assert {path.name for path in fourth.iterdir()} == STATE | {"README.md", "training_args.bin", "mine"}
    assert same(vectors(whole.model, "mine"), saved(second / "mine"))
    resumed = trainer(OURS, "llama", tmp_path / "resumed", fresh())
    resumed.train(resume_from_checkpoint=str(second))
    assert same(vectors(resumed.model, "mine"), saved(fourth / "mine"))
    assert not same(vectors(resumed.model, "mine"), saved(second / "mine"))


def test_transformers_own_trainer_saves_adapters_only(tmp_path):
    """Without PEFT too, where it can train and save, and cannot resume."""
    run = trainer(THEIRS, "bert", tmp_path)
    assert set(next(iter(run.get_train_dataloader()))) == BATCH["bert"]
    run.train()
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} == CHECKPOINT | STATE
    assert same(vectors(run.model), saved(tmp_path / "checkpoint-4"))


def test_a_trainers_own_card_says_that_it_is_an_adapter(tmp_path):
    model = adapted("llama")
    model.peft_config["default"].base_model_name_or_path = "owner/base"
    run = trainer(THEIRS, "llama", tmp_path, model, save_strategy="no")
    run.save_model()
    run.create_model_card(tags="mine")  # in place of ours
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == "owner/base"
    assert {"mine", "ia3", "base_model:adapter:owner/base"} <= set(card.data.tags)
    assert len(card.data.tags) == len(set(card.data.tags)) and "### Framework versions" in card.text


# TRL, which handles adapters only where PEFT is installed.

SENTENCES = {"text": ["the tea was fresh today", "the soup was stale today"] * 4}
PREFERENCES = {"prompt": ["the tea was"] * 8, "chosen": [" fresh today"] * 8, "rejected": [" stale"] * 8}


def trl_trainer(kind: str, folder: Path, model: Any, **more: Any) -> transformers.Trainer:
    trl = pytest.importorskip("trl")
    data = datasets.Dataset.from_dict(SENTENCES if kind == "SFT" else PREFERENCES)
    settings = {key: more.pop(key) for key in list(more) if key != "peft_config"}
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=options(getattr(trl, f"{kind}Config"), folder, bf16=False, **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=words.tokenizer(),
        **more,
    )


@with_peft
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_trains_an_adapted_model_as_pefts(kind, checkpointing, tmp_path):
    losses = []
    for library in (ia3, peft):
        run = trl_trainer(
            kind,
            tmp_path / library.__name__,
            adapted("llama", library),
            gradient_checkpointing=checkpointing,
            load_best_model_at_end=True,
        )
        run.train()
        losses.append([entry[key] for entry in run.state.log_history for key in ("loss", "eval_loss") if key in entry])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] > losses[0][-1]
    files = [{path.name for path in (tmp_path / name / "checkpoint-4").iterdir()} for name in ("ia3", "peft")]
    assert files[0] == files[1] and files[0] >= CHECKPOINT | STATE
    assert not {"model.safetensors", "pytorch_model.bin"} & files[0]

    model = adapted("llama")
    resumed = trl_trainer(kind, tmp_path / "resumed", model, gradient_checkpointing=checkpointing)
    assert resumed.model is model and type(model) is ia3.PeftModelForCausalLM
    resumed.train(resume_from_checkpoint=str(tmp_path / "ia3" / "checkpoint-2"))
    assert same(vectors(model), saved(tmp_path / "ia3" / "checkpoint-4"))


@with_peft
def test_the_reference_of_dpo_is_the_base_model(tmp_path):
    run = trl_trainer("DPO", tmp_path, adapted("llama"))
    run.train()
    assert run.ref_model is None and list(run.model.peft_config) == ["default", "ref"]
    assert all(torch.equal(value, torch.ones_like(value)) for value in vectors(run.model, "ref").values())
    assert not same(vectors(run.model), vectors(run.model, "ref"))


@with_peft
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_never_hands_our_config_to_peft(kind, tmp_path):
    """Whoever asks for our adapter does not get PEFT's without a word."""
    with pytest.raises(TypeError, match=r"PeftConfig.*IA3Config"):
        trl_trainer(kind, tmp_path, tiny.build("llama"), peft_config=ia3.IA3Config(task_type="CAUSAL_LM"))


@with_peft
def test_what_trl_makes_of_pefts_own_config_is_read_here(tmp_path):
    run = trl_trainer("SFT", tmp_path, tiny.build("llama"), peft_config=peft.IA3Config(task_type="CAUSAL_LM"))
    run.train()
    model = ia3.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "checkpoint-4")
    assert tiny.relative_error(tiny.logits(model, "llama"), tiny.logits(run.model.eval(), "llama")) < 1e-5
    with model.disable_adapter():
        assert tiny.relative_error(tiny.logits(model, "llama"), tiny.logits(run.model, "llama")) > 1e-3


@with_peft
def test_a_transformers_model_takes_an_adapter_by_injection(llama):
    config = ia3.IA3Config(task_type="CAUSAL_LM")
    with pytest.raises(TypeError, match=r"PeftConfig.*IA3Config"):
        llama.add_adapter(config)
    plain = tiny.logits(tiny.build("llama"), "llama")
    model = ia3.inject_adapter_in_model(config, tiny.build("llama"))
    assert type(model) is transformers.LlamaForCausalLM and torch.equal(tiny.logits(model, "llama"), plain)
    tiny.randomize(model)
    assert tiny.relative_error(tiny.logits(model, "llama"), plain) > 0.01


# Pipelines.


@pytest.mark.parametrize(
    "task, name, words_of",
    [
        ("text-generation", "llama", "generated_text"),
        ("text-classification", "bert", "label"),
    ],
)
def test_pipelines_say_no_more_than_of_the_base_model(task, name, words_of, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    said = []
    for adapt in (False, True):
        base = tiny.build(name, vocab_size=len(words.VOCABULARY))
        model = tiny.adapt(name, ia3, base=base) if adapt else base
        with caplog.at_level(logging.INFO, logger="transformers"):
            caplog.clear()
            pipeline = transformers.pipeline(task, model=model, tokenizer=words.tokenizer(), device="cpu")
            extra = {"max_new_tokens": 3} if name == "llama" else {}
            found = pipeline("the tea was", **extra)
        assert pipeline.model is model and found[0][words_of]
        said.append([record.getMessage() for record in caplog.records])
    assert said[0] == said[1]


@with_peft
def test_all_this_without_peft():
    """The tests above that need no PEFT, and every public name, in an interpreter where it cannot be imported."""
    code = """
import sys
sys.modules["peft"] = None
import ia3, pytest
assert [getattr(ia3, name) for name in ia3.__all__]
sys.exit(pytest.main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, __file__, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "9 passed" in done.stdout
