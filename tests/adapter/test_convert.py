"""Adapters of T-Few's authors, AdapterHub and pickled PEFT ones: converted, they act as they did."""

import json
import pickle
import re
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
import transformers

import ia3
from ia3.adapter.convert import convert, from_tfew
from support import tiny
from support.paths import DATA

TFEW = DATA / "tfew" / "t03b_ia3_finish.pt"
GATED = {"feed_forward_proj": "gated-gelu"}

# What AdapterHub's `IA3Config` rescales, from its model classes (adapters 1.3): names of modules in a layer.
ADAPTERHUB = {
    "bert": ("attention.self.key", "attention.self.value", "intermediate.dense"),
    "gpt2": ("attn.c_attn", "mlp.c_fc"),
    "llama": ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
    "t5": ("SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v", "DenseReluDense.wi"),
    "bart": ("self_attn.k_proj", "self_attn.v_proj", "encoder_attn.k_proj", "encoder_attn.v_proj", "fc1"),
}
CLASSES = {
    "bert": "BertForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
}


def width(module: torch.nn.Module) -> int:
    return module.weight.shape[1 if type(module).__name__ == "Conv1D" else 0]


def random_vectors(model, names) -> dict[str, torch.Tensor]:
    """A vector, (features, 1), for the output of every module that ends in one of the names; some are negative."""
    generator = torch.Generator().manual_seed(3)
    return {
        path: 1 + 0.7 * torch.randn(width(module), 1, generator=generator)
        for path, module in model.named_modules()
        if path.endswith(tuple(f".{name}" for name in names))
    }


@contextmanager
def rescaled(model, vectors):
    """The authors' own formula: each module's output, bias included, times its vector."""
    handles = []
    for path, vector in vectors.items():
        scale = vector.flatten()
        hook = lambda module, inputs, output, scale=scale: output * scale.to(output.dtype)  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    yield model
    for handle in handles:
        handle.remove()


def adapterhub(folder, vectors, arch, name="task", head=None, head_config=None, interface=None, **changes) -> Path:
    """An adapter folder as `adapters` 1.3 saves it."""
    config = {
        "alpha": 1, "architecture": "lora", "attn_matrices": ["k", "v"], "composition_mode": "scale", "dropout": 0.0,
        "dtype": None, "init_weights": "ia3", "init_weights_seed": None, "intermediate_lora": True, "leave_out": [],
        "output_lora": False, "r": 1, "selfattn_lora": True, "use_dora": False, "use_gating": False, "vera_b": None,
        "vera_d": None,
    }  # fmt: skip
    values = {
        "config": {**config, **{key: value for key, value in changes.items() if key in config}},
        "hidden_size": tiny.HIDDEN,
        "model_class": CLASSES[arch],
        "model_name": "",
        "model_type": arch,
        "name": name,
        "version": "adapters.1.3.0",
        **{key: value for key, value in changes.items() if key not in config},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    tensors = {f"{path}.loras.{name}.lora_B": vector for path, vector in vectors.items()}
    torch.save(tensors, folder / "pytorch_adapter.bin")
    if head is not None:
        torch.save(head, folder / "pytorch_model_head.bin")
        (folder / "head_config.json").write_text(json.dumps({**values, "config": head_config, "name": None}))
    if interface is not None:
        (folder / "adapter_interface.json").write_text(json.dumps({"interface": interface}))
    return folder


def tfew(path, vectors) -> Path:
    torch.save({f"{name}.multi_lora_b": vector for name, vector in vectors.items()}, path)
    return path


def loaded(library, base, folder):
    return library.PeftModel.from_pretrained(base, folder).eval()


def assert_acts_alike(arch, vectors, folder, **sizes) -> None:
    """The converted adapter and the authors' formula, in float64, loaded by our library and by PEFT."""
    base = tiny.build(arch, **sizes).double()
    with rescaled(base, vectors):
        expected = tiny.logits(base, arch)
    assert tiny.relative_error(expected, tiny.logits(base, arch)) > 1e-3  # they do rescale
    for library in (ia3, peft):
        model = loaded(library, tiny.build(arch, **sizes).double(), folder)
        assert tiny.relative_error(tiny.logits(model, arch), expected) < 1e-12, library.__name__


class TestAdapterHub:
    @pytest.mark.parametrize("arch", ADAPTERHUB)
    def test_adapters_act_as_they_did(self, arch, tmp_path):
        model = tiny.build(arch)
        vectors = random_vectors(model, ADAPTERHUB[arch])
        parts = {path: vector[tiny.HIDDEN :] if path.endswith("c_attn") else vector for path, vector in vectors.items()}
        for path, vector in vectors.items():
            if path.endswith("c_attn"):
                vector[: tiny.HIDDEN] = 1  # queries
        converted = convert(adapterhub(tmp_path / "hub", parts, arch), tmp_path / "out")
        assert converted.source == "AdapterHub" and not converted.notes
        assert converted.config.target_modules == set(ADAPTERHUB[arch])
        assert not converted.config.feedforward_modules
        # Without the head that BERT's adapter has beside it, the task would ask for one.
        assert converted.config.task_type == (None if arch == "bert" else tiny.TASKS[arch])
        assert_acts_alike(arch, vectors, tmp_path / "out")

    @pytest.mark.parametrize("arch", ["bert", "t5", "llama"])
    def test_queries_outputs_and_layers_left_out(self, arch, tmp_path):
        more = {
            "bert": ("attention.self.query", "1.output.dense"),
            "t5": ("SelfAttention.q", "EncDecAttention.q", "DenseReluDense.wo"),
            "llama": ("self_attn.q_proj", "mlp.up_proj"),
        }[arch]
        vectors = random_vectors(tiny.build(arch), ADAPTERHUB[arch] + more)
        vectors = {path: vector for path, vector in vectors.items() if re.search(r"(layers?|block)\.1\.", path)}
        options = {"output_lora": True, "leave_out": [0], "attn_matrices": ["q", "k", "v"]}
        converted = convert(adapterhub(tmp_path / "hub", vectors, arch, **options), tmp_path / "out")
        assert converted.config.target_modules == set(vectors)
        assert_acts_alike(arch, vectors, tmp_path / "out")

    @pytest.mark.parametrize("parts", ["v", "qv", "vk", "qkv"])
    def test_a_fused_projection_has_the_parts_that_were_chosen(self, parts, tmp_path):
        vectors = random_vectors(tiny.build("gpt2"), ["attn.c_attn"])
        given = {}
        for path, vector in vectors.items():
            thirds = dict(zip("qkv", vector.chunk(3), strict=True))
            given[path] = torch.cat([third for part, third in thirds.items() if part in parts])
            for part in set("qkv") - set(parts):
                thirds[part].fill_(1)
        convert(adapterhub(tmp_path / "hub", given, "gpt2", attn_matrices=list(parts)), tmp_path / "out")
        assert_acts_alike("gpt2", vectors, tmp_path / "out")

    def test_a_fused_projection_that_the_interface_names(self, tmp_path):
        vectors = {"model.layers.0.attn.Wqkv": torch.full((8, 1), 3.0)}
        folder = adapterhub(tmp_path / "hub", vectors, "bert", interface={"attn_qkv_proj": "Wqkv"})
        converted = convert(folder, tmp_path / "out")
        (vector,) = converted.tensors.values()
        assert vector.flatten().tolist() == [1.0] * 4 + [3.0] * 8
        # AdapterHub's `LoRAMergedLinear` is made with a bias, and keeps a random one where the base has none.
        assert len(converted.notes) == 1 and "random bias" in converted.notes[0]

    @pytest.mark.parametrize(
        ("version", "alpha", "factor"),
        [("adapters.1.3.0", 2, 2), ("adapters.1.0.1", 2, 1), ("adapters.0.2.0", 2, 1), ("3.2.1", 2, 2)],
    )
    def test_alpha(self, version, alpha, factor, tmp_path):
        vectors = random_vectors(tiny.build("bert"), ADAPTERHUB["bert"])
        convert(adapterhub(tmp_path / "hub", vectors, "bert", version=version, alpha=alpha), tmp_path / "out")
        assert_acts_alike("bert", {path: vector * factor for path, vector in vectors.items()}, tmp_path / "out")

    @pytest.mark.parametrize("alpha", [1e38, 10**30 * 10**30, 10**400])
    def test_vectors_that_are_infinite_times_alpha_are_refused(self, alpha, tmp_path):
        folder = adapterhub(tmp_path / "hub", {"bert.layer.0.key": torch.full((4, 1), 10.0)}, "bert", alpha=alpha)
        refused(folder, tmp_path, "too large" if alpha > 1e300 else "finite times alpha")

    @pytest.mark.parametrize("changes", [{"model_name": 5}, {"model_name": ["x"]}], ids=str)
    def test_fields_of_another_kind_are_refused(self, changes, tmp_path):
        folder = adapterhub(tmp_path / "hub", {"bert.layer.0.key": torch.ones(4, 1)}, "bert", **changes)
        refused(folder, tmp_path, "base_model_name_or_path")

    @pytest.mark.parametrize("interface", [[], 5, {"attn_qkv_proj": []}], ids=str)
    def test_an_interface_of_another_kind_is_no_crash(self, interface, tmp_path):
        vectors = {"bert.layer.0.key": torch.ones(4, 1)}
        folder = adapterhub(tmp_path / "hub", vectors, "bert", interface=interface)
        if isinstance(interface, dict):
            assert convert(folder, tmp_path / "out").tensors
        else:
            refused(folder, tmp_path, "Expected an (IA)³ adapter")

    def test_alpha_rescales_a_fused_projections_ones_too(self, tmp_path):
        vectors = random_vectors(tiny.build("gpt2"), ["attn.c_attn"])
        parts = {path: vector[tiny.HIDDEN :].clone() for path, vector in vectors.items()}
        for vector in vectors.values():
            vector[: tiny.HIDDEN] = 1
            vector *= 2
        convert(adapterhub(tmp_path / "hub", parts, "gpt2", alpha=2), tmp_path / "out")
        assert_acts_alike("gpt2", vectors, tmp_path / "out")

    def test_t5s_gated_feed_forward_takes_the_papers_form(self, tmp_path):
        names = ("SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v", "DenseReluDense.wi_1")
        vectors = random_vectors(tiny.build("t5", **GATED), names)
        saved = {f"transformer.{path}": vector for path, vector in vectors.items()}  # AdapterHub's T5AdapterModel
        folder = adapterhub(tmp_path / "hub", saved, "t5", model_class="T5AdapterModel")
        converted = convert(folder, tmp_path / "out")
        assert converted.config.feedforward_modules == {"DenseReluDense.wo"}
        assert_acts_alike("t5", vectors, tmp_path / "out", **GATED)

    def test_safetensors(self, tmp_path):
        from safetensors.torch import save_file

        vectors = random_vectors(tiny.build("llama"), ADAPTERHUB["llama"])
        folder = adapterhub(tmp_path / "hub", vectors, "llama")
        save_file(torch.load(folder / "pytorch_adapter.bin"), folder / "adapter.safetensors")
        (folder / "pytorch_adapter.bin").unlink()
        convert(folder, tmp_path / "out")
        assert_acts_alike("llama", vectors, tmp_path / "out")

    @pytest.mark.parametrize("library", [ia3, peft], ids=["ia3", "peft"])
    def test_a_classes_own_head_comes_along(self, library, tmp_path):
        trained = tiny.build("bert", seed=4)
        head = {f"classifier.{key}": value for key, value in trained.classifier.state_dict().items()}
        vectors = random_vectors(trained, ADAPTERHUB["bert"])
        converted = convert(adapterhub(tmp_path / "hub", vectors, "bert", head=head), tmp_path / "out")
        assert converted.config.modules_to_save == ["classifier"] and not converted.notes
        base = tiny.build("bert")
        base.classifier.load_state_dict(trained.classifier.state_dict())
        with rescaled(base, vectors):
            expected = tiny.logits(base, "bert")
        model = loaded(library, tiny.build("bert"), tmp_path / "out")
        assert tiny.relative_error(tiny.logits(model, "bert"), expected) < 1e-6

    @pytest.mark.parametrize(
        ("arch", "model_class", "head", "said"),
        [
            ("bert", "BertAdapterModel", "heads.task.1.weight", "left out."),
            ("llama", "LlamaForCausalLM", "lm_head.weight", "base model's, unless it was trained"),
        ],
    )
    def test_other_heads_are_left_out_and_it_is_said(self, arch, model_class, head, said, tmp_path):
        vectors = random_vectors(tiny.build(arch), ADAPTERHUB[arch])
        folder = adapterhub(
            tmp_path / "hub", vectors, arch, head={head: torch.ones(3, 3)}, head_config={}, model_class=model_class
        )
        converted = convert(folder, tmp_path / "out")
        assert len(converted.notes) == 1 and "pytorch_model_head.bin" in converted.notes[0]
        assert said in converted.notes[0]
        assert_acts_alike(arch, vectors, tmp_path / "out")

    @pytest.mark.parametrize(
        "changes",
        [
            {"composition_mode": "add", "r": 8},
            {"use_gating": True},
            {"config": {"architecture": "union", "configs": []}},
            {"config": None},
            {"config": "pfeiffer"},
        ],
        ids=["lora", "gate", "union", "none", "name"],
    )
    def test_other_methods_are_refused(self, changes, tmp_path):
        folder = adapterhub(tmp_path / "hub", random_vectors(tiny.build("bert"), ADAPTERHUB["bert"]), "bert", **changes)
        refused(folder, tmp_path, "another method's, or with a gate")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"alpha": "2"}, "number for alpha"),
            ({"alpha": float("nan")}, "number for alpha"),
            ({"attn_matrices": ["q", "k", "v"]}, "fused projection in 'transformer.h.0.attn.c_attn"),
            ({"attn_matrices": 5}, "fused projection"),
        ],
    )
    def test_values_that_make_no_sense_are_refused(self, changes, said, tmp_path):
        refused(adapterhub(tmp_path / "hub", {"transformer.h.0.attn.c_attn": torch.ones(64, 1)}, "gpt2", **changes),
                tmp_path, said)  # fmt: skip

    def test_another_adapters_tensors_are_named(self, tmp_path):
        folder = adapterhub(tmp_path / "hub", random_vectors(tiny.build("bert"), ADAPTERHUB["bert"]), "bert")
        tensors = torch.load(folder / "pytorch_adapter.bin")
        tensors["bert.encoder.layer.0.output.adapters.task.adapter_up.weight"] = torch.ones(2, 2)
        torch.save(tensors, folder / "pytorch_adapter.bin")
        refused(folder, tmp_path, "adapter_up.weight")

    def test_the_bases_name(self, tmp_path):
        vectors = random_vectors(tiny.build("bert"), ADAPTERHUB["bert"])
        folder = adapterhub(tmp_path / "hub", vectors, "bert", model_name="bert-base-uncased")
        assert convert(folder, tmp_path / "a").config.base_model_name_or_path == "bert-base-uncased"
        assert convert(folder, tmp_path / "b", base="mine").config.base_model_name_or_path == "mine"
        assert "base_model: mine" in (tmp_path / "b" / "README.md").read_text()


class TestTFew:
    @pytest.mark.parametrize(
        ("names", "sizes", "feedforward"),
        [
            (("SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v", "wi_1"), GATED, True),
            (("SelfAttention.k", "wi_0", "wi_1"), GATED, True),
            (("wi_1", "wo"), GATED, False),
            (("EncDecAttention.v", "wi"), {}, False),  # negative before ReLU: nothing after it has the same effect
        ],
        ids=["ia3", "both gates", "output too", "ungated"],
    )
    def test_adapters_act_as_they_did(self, names, sizes, feedforward, tmp_path):
        vectors = random_vectors(tiny.build("t5", **sizes), names)
        converted = convert(tfew(tmp_path / "finish.pt", vectors), tmp_path / "out")
        assert converted.source == "T-Few" and converted.config.task_type == "SEQ_2_SEQ_LM"
        assert bool(converted.config.feedforward_modules) is feedforward
        assert_acts_alike("t5", vectors, tmp_path / "out", **sizes)

    @pytest.mark.parametrize(
        ("name", "shape", "said"),
        [
            ("encoder.block.0.layer.0.SelfAttention.k.multi_lora_b", (4, 2), "(4, 2)"),
            ("encoder.block.0.layer.0.SelfAttention.k.multi_lora_b", (4,), "(4,)"),
            ("encoder.block.0.layer.0.SelfAttention.k.multi_lora_b", (0, 1), "(0, 1)"),
            ("encoder.block.0.layer.0.SelfAttention.k.multi_lora_a", (1, 4), "multi_lora_a"),
            ("encoder.block.0.layer.0.SelfAttention.k.lora_a", (4, 4), "SelfAttention.k.lora_a"),
        ],
    )
    def test_other_tensors_are_refused(self, name, shape, said):
        with pytest.raises(ia3.InputError, match=re.escape(said)):
            from_tfew(
                {"decoder.block.0.layer.0.SelfAttention.k.multi_lora_b": torch.ones(4, 1), name: torch.ones(shape)}
            )

    @pytest.mark.skipif(not TFEW.is_file(), reason=f"needs the authors' vectors for T0-3B, {TFEW} (IA3_TEST_DATA)")
    def test_the_authors_vectors_for_t0_3b_fit(self, tmp_path):
        converted = convert(TFEW, tmp_path / "out", base="bigscience/T0_3B")
        assert sum(tensor.numel() for tensor in converted.tensors.values()) == 540_672
        with torch.device("meta"):
            bases = [transformers.T5ForConditionalGeneration(t0_3b(layers=24)) for _ in range(2)]
        for library, base in zip((ia3, peft), bases, strict=True):
            model = library.PeftModel.from_pretrained(base, tmp_path / "out", low_cpu_mem_usage=True)
            found = tiny.adapter_parameters(model)
            assert {
                f"base_model.model.{name.removesuffix('.default')}": value.shape for name, value in found.items()
            } == {name: value.shape for name, value in converted.tensors.items()}

    @pytest.mark.skipif(not TFEW.is_file(), reason=f"needs the authors' vectors for T0-3B, {TFEW} (IA3_TEST_DATA)")
    def test_the_authors_vectors_for_t0_3b_act_as_they_did(self, tmp_path):
        tensors = torch.load(TFEW, weights_only=True)
        vectors = {name.removesuffix(".multi_lora_b"): value for name, value in tensors.items() if ".block.0." in name}
        assert len(vectors) == 3 + 5
        convert(tfew(tmp_path / "finish.pt", vectors), tmp_path / "out")
        torch.manual_seed(0)
        base = transformers.T5ForConditionalGeneration(t0_3b(layers=1)).eval()
        batch = {"input_ids": torch.randint(2, 100, (2, 9)), "decoder_input_ids": torch.randint(2, 100, (2, 5))}
        with torch.no_grad():
            plain = base(**batch).logits
            with rescaled(base, vectors):
                expected = base(**batch).logits
            assert tiny.relative_error(plain, expected) > 1e-3
            for library in (ia3, peft):
                model = loaded(library, base, tmp_path / "out")
                assert tiny.relative_error(model(**batch).logits, expected) < 1e-5
                base = model.unload()


def t0_3b(layers: int) -> transformers.T5Config:
    """T0-3B's shapes (those of T5 v1.1 XL), with a small vocabulary."""
    return transformers.T5Config(
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_heads=32,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        vocab_size=128,
        decoder_start_token_id=0,
    )


class TestPEFT:
    @pytest.mark.parametrize("library", [ia3, peft], ids=["ia3", "peft"])
    def test_pickled_tensors_become_safetensors(self, library, arch, tmp_path):
        model = tiny.adapt(arch, library)
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
        pickled(tmp_path / "pickled")
        converted = convert(tmp_path / "pickled", tmp_path / "out")
        assert converted.source == "PEFT"
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
        expected = tiny.logits(model, arch)
        for reader in (ia3, peft):
            found = tiny.logits(loaded(reader, tiny.build(arch), tmp_path / "out"), arch)
            assert tiny.relative_error(found, expected) < 1e-6

    def test_safetensors_need_no_conversion(self, tmp_path):
        tiny.adapt("llama", ia3).save_pretrained(tmp_path / "adapter")
        refused(tmp_path / "adapter", tmp_path, "in safetensors already")

    def test_lora_is_refused(self, tmp_path):
        model = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(target_modules=["k_proj"]))
        model.save_pretrained(tmp_path / "adapter")
        refused(tmp_path / "adapter", tmp_path, "'LORA'")

    @pytest.mark.parametrize(
        ("name", "shape", "said"),
        [
            ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", (2, 2), "lora_A"),
            ("base_model.model.score.weight", (2, 2), "score.weight"),
            ("base_model.model.model.layers.0.mlp.up_proj.ia3_l", (2, 2), "(2, 2)"),
        ],
    )
    def test_other_tensors_are_refused(self, name, shape, said, tmp_path):
        tiny.adapt("llama", ia3).save_pretrained(tmp_path / "adapter", safe_serialization=False)
        tensors = torch.load(tmp_path / "adapter" / "adapter_model.bin")
        torch.save({**tensors, name: torch.ones(shape)}, tmp_path / "adapter" / "adapter_model.bin")
        refused(tmp_path / "adapter", tmp_path, said)


def pickled(folder: Path) -> None:
    """Newer releases of PEFT write safetensors whatever they are asked for."""
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if file.exists():
        torch.save(load_file(file), folder / "adapter_model.bin")
        file.unlink()


def refused(source, tmp_path, said: str) -> None:
    """One line that says what is wrong, and nothing written."""
    with pytest.raises(ia3.InputError, match=re.escape(said)) as caught:
        convert(source, tmp_path / "refused")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class TestBadInput:
    def good(self) -> dict:
        return {"encoder.block.0.layer.0.SelfAttention.k.multi_lora_b": torch.ones(4, 1)}

    @pytest.mark.parametrize("protocol", ["torch", "pickle"])
    def test_a_pickle_that_runs_code_is_not_run(self, protocol, tmp_path):
        content = {**self.good(), "x": Runs(tmp_path / "ran")}
        with (tmp_path / "finish.pt").open("wb") as file:
            torch.save(content, file) if protocol == "torch" else pickle.dump(content, file)
        refused(tmp_path / "finish.pt", tmp_path, "nothing that runs code")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("kept", [0, 10, 0.5, 0.98])
    def test_a_file_cut_short(self, kept, tmp_path):
        torch.save(self.good(), tmp_path / "finish.pt")
        content = (tmp_path / "finish.pt").read_bytes()
        (tmp_path / "finish.pt").write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
        refused(tmp_path / "finish.pt", tmp_path, "is it cut short?")

    @pytest.mark.parametrize(
        "content",
        [
            [torch.ones(4, 1)],
            {"state_dict": {"k": torch.ones(4, 1)}},
            {"k.multi_lora_b": torch.ones(4, 1).to_sparse()},
            {"k.multi_lora_b": torch.ones(1, 1).expand(2**40, 1)},
            {"k.multi_lora_b": torch.ones(4, 1, device="meta")},
            {0: torch.ones(4, 1)},
        ],
        ids=["list", "nested", "sparse", "expanded", "without memory", "number for a name"],
    )
    def test_other_content(self, content, tmp_path):
        torch.save(content, tmp_path / "finish.pt")
        refused(tmp_path / "finish.pt", tmp_path, "Expected a flat dictionary")

    def test_nothing(self, tmp_path):
        torch.save({}, tmp_path / "finish.pt")
        refused(tmp_path / "finish.pt", tmp_path, "found none among 0")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite(self, value, tmp_path):
        torch.save({**self.good(), "x.k.multi_lora_b": torch.tensor([[1.0], [value]])}, tmp_path / "finish.pt")
        refused(tmp_path / "finish.pt", tmp_path, "NaN or infinite values in 'x.k.multi_lora_b'")

    def test_weights_without_their_folder(self, tmp_path):
        vectors = random_vectors(tiny.build("bert"), ADAPTERHUB["bert"])
        folder = adapterhub(tmp_path / "hub", vectors, "bert")
        refused(folder / "pytorch_adapter.bin", tmp_path, "a file without its folder")

    def test_missing_files(self, tmp_path):
        refused(tmp_path / "finish.pt", tmp_path, "Can't find the file")
        refused(tmp_path, tmp_path, "adapter_config.json")
        folder = adapterhub(tmp_path / "hub", {}, "bert")
        (folder / "pytorch_adapter.bin").unlink()
        refused(folder, tmp_path, "adapter.safetensors")

    @pytest.mark.parametrize(("text", "said"), [('{"config": ', "Expected JSON"), ("[1]", "found list")])
    def test_a_config_that_is_none(self, text, said, tmp_path):
        folder = adapterhub(tmp_path / "hub", {}, "bert")
        (folder / "adapter_config.json").write_text(text)
        refused(folder, tmp_path, said)

    def test_an_output_in_use_is_left_alone(self, tmp_path):
        torch.save(self.good(), tmp_path / "finish.pt")
        convert(tmp_path / "finish.pt", tmp_path / "out")
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        for output in (tmp_path / "out", tmp_path / "finish.pt"):
            with pytest.raises(ia3.InputError, match="new or empty folder"):
                convert(tmp_path / "finish.pt", output)
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2], ids=str)
    def test_numbers_of_another_kind(self, dtype, tmp_path):
        torch.save({"x.k.multi_lora_b": torch.ones(4, 1).to(dtype)}, tmp_path / "finish.pt")
        refused(tmp_path / "finish.pt", tmp_path, f"{dtype} in 'x.k.multi_lora_b'")

    def test_numbers_that_are_infinite_in_float32(self, tmp_path):
        torch.save({"x.k.multi_lora_b": torch.full((4, 1), 1e300, dtype=torch.float64)}, tmp_path / "finish.pt")
        refused(tmp_path / "finish.pt", tmp_path, "'x.k.multi_lora_b' that are infinite in torch.float32")

    def test_half_precision_is_read(self, tmp_path):
        torch.save({name: value.bfloat16() for name, value in self.good().items()}, tmp_path / "finish.pt")
        (vector,) = convert(tmp_path / "finish.pt", tmp_path / "out").tensors.values()
        assert vector.dtype == torch.float32
