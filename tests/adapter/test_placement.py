"""Models whose weights are elsewhere than where they compute answer and learn as plain ones."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from torch import nn

from ia3 import AdapterBank, IA3Config, IA3Model, InputError, Member, Recipe, Scorer, Task, TFewTrainer, load_base
from ia3.adapter.placement import device_of, is_sharded, is_spread, shard
from support import tiny, words

TASK = Task(template=words.TEMPLATE, choices=words.CHOICES)
RECIPE = Recipe(steps=4, batch_size=4)


def in_two_places(base, folder):
    """Every other part on disk."""
    parts = infer_auto_device_map(base, {"cpu": 10**9}, base._no_split_modules, clean_result=False)
    places = {name: ("cpu", "disk")[number % 2] for number, name in enumerate(parts)}
    return dispatch_model(base, places, main_device="cpu", offload_dir=folder)


def loaded_automatically(base, folder):
    """A device that holds next to nothing, so that transformers leaves the weights in their file."""
    base.save_pretrained(folder / "model")
    options = {"device_map": "auto", "max_memory": {"cpu": "20KB"}, "offload_folder": folder / "offloaded"}
    return type(base).from_pretrained(folder / "model", **options).eval()


WAYS = {
    "in main memory": lambda base, _: cpu_offload(base, execution_device=torch.device("cpu")),
    "on disk in parts": in_two_places,
    "device_map": loaded_automatically,
}


def build(name, way, folder, place="start"):
    torch.manual_seed(0)
    base = tiny.build(name).eval()
    if way is not None:
        base = WAYS[way](base, folder)
        assert is_spread(base) and any(parameter.is_meta for parameter in base.parameters())
        assert device_of(base).type == "cpu"
    torch.manual_seed(1)
    return IA3Model(base, IA3Config(task_type=tiny.TASKS[name], init_ia3_weights=False, acts_from=place))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["start", "question"])
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("way", WAYS)
def test_offloaded_models_answer_and_learn_as_plain_ones(way, name, place, tmp_path):
    def found(way):
        model = build(name, way, tmp_path, place)
        scorer = Scorer(model, words.tokenizer())
        questions = scorer.questions(TASK.wordings(words.rows(8)))
        before = torch.stack(scorer.score(questions))
        arguments = RECIPE.training_arguments(tmp_path / "run", save_strategy="steps", save_steps=2)
        run = TFewTrainer(model, arguments, words.tokenizer(), Member(TASK, words.rows(12)), RECIPE)
        run.silence()
        run.train()
        vectors = [parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad]
        model.save_pretrained(tmp_path / "adapter")
        again = IA3Model.from_pretrained(model.unload(), tmp_path / "adapter").eval()
        return before, torch.cat(vectors), torch.stack(Scorer(again, words.tokenizer()).score(questions))

    (before, vectors, after), (its, plain, later) = found(way), found(None)
    torch.testing.assert_close(before, its)
    # Adafactor divides by the gradients' sizes, so that rounding of small ones, 2e-7 of the largest, shows.
    assert (plain - 1).abs().max() > 0.1
    torch.testing.assert_close(vectors, plain, atol=2e-4, rtol=0)
    torch.testing.assert_close(after, later, atol=2e-4, rtol=0)


def test_a_bank_of_an_offloaded_model(tmp_path):
    plain, spread = build("llama", None, tmp_path), build("llama", "on disk in parts", tmp_path)
    scores = []
    for model in (plain, spread):
        model.save_pretrained(tmp_path / "one")
        config = model.peft_config["default"]
        adapted = IA3Model(model.unload(), {}).eval()
        AdapterBank(adapted, config).load(tmp_path / "one", "one")
        scorer = Scorer(adapted, words.tokenizer())
        questions = scorer.questions(TASK.wordings(words.rows(4)))
        scores.append(torch.stack(scorer.score(questions, adapter_names=["one", "__base__"] * 2)))
    torch.testing.assert_close(*scores)


def test_what_needs_the_weights_says_so(tmp_path):
    model = build("llama", "in main memory", tmp_path)
    with pytest.raises(InputError, match="Expected the weights of a Linear in this process, found them offloaded"):
        model.merge_adapter()
    with pytest.raises(InputError, match="Expected a model in main memory"):
        shard(model)
    with pytest.raises(InputError, match="names its layers"):
        shard(nn.Linear(2, 2))


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_shares_of_layers_answer_as_whole_ones(one_process, tmp_path):
    """Layers alone are divided, vectors and embeddings are not; training and asking may follow each other."""
    plain, shared = build("llama", None, tmp_path), build("llama", None, tmp_path)
    shared.add_adapter("other", IA3Config(task_type="CAUSAL_LM"))  # frozen, and not divided either
    shard(shared)
    divided = {name for name, parameter in shared.named_parameters() if hasattr(parameter, "device_mesh")}
    assert divided and all(".layers." in name and "ia3_l" not in name for name in divided)
    assert is_sharded(shared) and not is_sharded(plain)
    found = []
    for model in (plain, shared):
        scorer = Scorer(model, words.tokenizer())
        questions = scorer.questions(TASK.wordings(words.rows(8)))
        before = torch.stack(scorer.score(questions))
        model.train()
        scorer.log_probs(scorer.collate(questions)).sum().backward()
        gradients = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
        found.append((before, torch.cat(gradients), torch.stack(scorer.score(questions))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(InputError, match="Expected the weights of a Linear in this process, found a share of them"):
        shared.merge_adapter()


def test_models_without_hooks_are_where_their_weights_are():
    module = nn.Sequential(nn.ReLU(), nn.Linear(2, 2, device="meta"))
    assert device_of(module).type == "meta" and not is_spread(module) and not is_sharded(module)
    offloaded = cpu_offload(nn.Linear(2, 2), execution_device=torch.device("cpu"))
    assert device_of(offloaded).type == "cpu"


def test_device_maps_of_load_base(tmp_path, monkeypatch):
    words.save_model(tmp_path)
    asked = [Scorer(*load_base(str(tmp_path), device_map=where)) for where in (None, "auto")]
    questions = asked[0].questions(TASK.wordings(words.rows(4)))
    torch.testing.assert_close(*[torch.stack(scorer.score(questions)) for scorer in asked])
    with pytest.raises(
        InputError, match="Expected a device_map of 'auto', 'shards', found 'atuo'; close to it: 'auto'"
    ):
        load_base(str(tmp_path), device_map="atuo")
    with pytest.raises(InputError, match="Expected several processes for the device_map 'shards', found WORLD_SIZE=1"):
        load_base(str(tmp_path), device_map="shards")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="Expected one process for the device_map 'auto', found WORLD_SIZE=2"):
        load_base(str(tmp_path), device_map="auto")
