"""Adapters that act from the question on: what stands before it is read by the frozen model, whatever the vectors are."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3 import AdapterBank, IA3Config, IA3Model, InputError, PeftModel
from support import tiny

DECODERS = ("gpt2", "llama", "opt")
# Fused and interleaved projections, a parallel block, one key/value head, positions added to scores.
MORE = {
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def adapted(arch: str, adapter: str = "default", **fields):
    base = (
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(arch, vocab_size=tiny.VOCAB, **MORE[arch])
        ).eval()
        if arch in MORE
        else tiny.build(arch)
    )
    model = IA3Model(base, IA3Config(task_type="CAUSAL_LM", acts_from="question", **fields), adapter)
    tiny.randomize(model, adapter=adapter)
    return model


def tokens(rows: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read_apart(model, ids: torch.Tensor, start: int) -> torch.Tensor:
    """The logits of one row (1, L) whose text the base model reads first; the adapter then acts on all that follows."""
    cache = transformers.DynamicCache()
    found = []
    if start:
        with model.disable_adapter():
            found.append(model(ids[:, :start], past_key_values=cache, use_cache=True).logits)
    options = {"past_key_values": cache} if start else {"acts_from": [0]}
    found.append(model(ids[:, start:], use_cache=True, **options).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("arch", [*DECODERS, *MORE])
def test_each_row_is_as_if_the_base_model_had_read_its_text(arch):
    model, ids, starts = adapted(arch), tokens(), [0, 4, 8]
    with torch.no_grad():
        found = model(ids, acts_from=starts).logits
        start_kind = model(ids, acts_from=[0, 0, 0]).logits
    for row, start in enumerate(starts):
        expected = read_apart(model, ids[row : row + 1], start)
        assert tiny.relative_error(found[row : row + 1], expected) < 2e-6
    with model.disable_adapter(), torch.no_grad():
        base = model(ids).logits
    assert tiny.relative_error(found[1, :4], base[1, :4]) < 2e-6
    for other in (base, start_kind):
        assert tiny.relative_error(found[1, 4:], other[1, 4:]) > 1e-3


@pytest.fixture(scope="module")
def mixed():
    model = adapted("llama", "asks")
    for name, acts_from in (("asks too", "question"), ("reads", "start")):
        model.add_adapter(name, IA3Config(task_type="CAUSAL_LM", acts_from=acts_from))
        tiny.randomize(model, 5 + len(name), name)
    return model


@settings(max_examples=20)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["asks", "asks too", "reads", "__base__"]), st.integers(0, 8)), min_size=1, max_size=4
    )
)
def test_rows_of_both_kinds_in_one_batch(mixed, rows):
    names, starts = map(list, zip(*rows, strict=True))
    ids = tokens(len(rows))
    with torch.no_grad():
        found = mixed(ids, adapter_names=names, acts_from=starts).logits
        for row, (name, start) in enumerate(rows):
            if name == "__base__":
                with mixed.disable_adapter():
                    alone = mixed(ids[row : row + 1]).logits
            else:
                mixed.set_adapter(name)
                alone = mixed(ids[row : row + 1], acts_from=[0 if name == "reads" else start]).logits
            assert tiny.relative_error(found[row : row + 1], alone) < 2e-6


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_goes_on_from_the_question(beams):
    model, ids = adapted("llama"), tokens(2, 7)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), acts_from=[3, 6], **options)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), acts_from=[0, 0], **options)
    assert not torch.equal(found, plain)
    assert model.ia3_routing.starts is None
    if beams == 1:
        for row, start in enumerate((3, 6)):
            sequence = ids[row : row + 1]
            for _ in range(5):
                sequence = torch.cat([sequence, read_apart(model, sequence, start)[:, -1:].argmax(-1)], 1)
            assert torch.equal(found[row : row + 1], sequence)


def test_gradients_reach_the_vectors_from_the_question_alone_also_through_checkpointed_layers():
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model = adapted("llama")
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(tokens(), acts_from=[2, 5, 8], use_cache=False).logits.square().mean().backward()
        return [parameter.grad for _, parameter in sorted(tiny.adapter_parameters(model).items())]

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(plain, checkpointed, strict=True))
    assert any(one.abs().sum() > 0 for one in plain)


def test_a_pass_that_does_not_say_where_the_question_begins_is_refused():
    model, ids = adapted("llama"), tokens()
    with pytest.raises(InputError, match="Expected acts_from, the place in each row where its question begins"):
        model(ids)
    with pytest.raises(InputError, match="Expected acts_from, the place"):
        model.generate(ids, max_new_tokens=1)
    for wrong in ([1, 2], [0, 1, -1], [0.5, 1.0, 2.0]):
        with pytest.raises(InputError, match="Expected acts_from as a whole number of 0 or more for each of 3 rows"):
            model(ids, acts_from=wrong)
    assert model.ia3_routing.starts is None
    with model.disable_adapter():
        model(ids)


def test_an_adapter_of_pefts_kind_does_not_care(mixed):
    ids = tokens()
    mixed.set_adapter("reads")
    with torch.no_grad():
        assert torch.equal(mixed(ids).logits, mixed(ids, acts_from=[1, 2, 3]).logits)


def test_a_folder_comes_back_and_peft_refuses_it(tmp_path):
    model, ids = adapted("llama"), tokens()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["acts_from"]) == ("IA3_FROM_QUESTION", "question")
    assert "act from the question on" in (tmp_path / "README.md").read_text()
    again = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert again.peft_config["default"].acts_from == "question"
    with torch.no_grad():
        assert torch.equal(again(ids, acts_from=[3, 4, 5]).logits, model(ids, acts_from=[3, 4, 5]).logits)
    with pytest.raises(KeyError, match="IA3_FROM_QUESTION"):
        peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path)


def test_a_config_of_pefts_kind_is_written_as_pefts():
    assert "acts_from" not in IA3Config().to_dict()
    assert IA3Config().to_dict()["peft_type"] == "IA3"
    assert IA3Config.from_dict({"peft_type": "IA3_FROM_QUESTION"}).acts_from == "question"


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused(merge):
    model = adapted("llama")
    before = tiny.state(model)
    with pytest.raises(InputError, match="merged weights would act on the text too"):
        getattr(model, merge)()
    assert tiny.same_bits(tiny.state(model), before)


@pytest.mark.parametrize(
    ("arch", "fields", "says"),
    [
        (
            "t5",
            {"task_type": "CAUSAL_LM"},
            "decoder-only .* found a T5ForConditionalGeneration and task_type CAUSAL_LM",
        ),
        ("t5", {"modules_to_save": ["lm_head"]}, "Expected no modules_to_save"),
        (
            "t5",
            {"target_modules": ["encoder.block.0.layer.0.SelfAttention.k"]},
            r"leaves none of .* \(only modules of the decoder\)",
        ),
        ("t5", {"target_modules": ["shared"]}, r"leaves none of .* \(only modules of the decoder\)"),
        ("llama", {"modules_to_save": ["lm_head"]}, "Expected no modules_to_save"),
        (
            "bert",
            {"task_type": "SEQ_CLS"},
            "decoder-only .* found a BertForSequenceClassification and task_type SEQ_CLS",
        ),
        ("llama", {"acts_from": "middle"}, "Expected `acts_from` to be 'start' or 'question'"),
    ],
)
def test_what_cannot_act_from_the_question_on(arch, fields, says):
    base = tiny.build(arch)
    before = tiny.state(base)
    with pytest.raises(InputError, match=says):
        IA3Model(base, IA3Config(**{"acts_from": "question", **fields}))
    assert tiny.same_bits(tiny.state(base), before)


def test_active_adapters_are_of_one_kind(mixed):
    mixed.set_adapter(["asks", "asks too"])
    with pytest.raises(InputError, match="all act from the start of a text, or all from the question on"):
        mixed.set_adapter(["asks", "reads"])
    assert mixed.active_adapters == ["asks", "asks too"]


def test_weighted_adapters_act_from_where_theirs_do(mixed):
    with pytest.raises(InputError, match="all act from the start of a text, or all from the question on"):
        mixed.add_weighted_adapter(["asks", "reads"], [0.5, 0.5], "both")
    mixed.add_weighted_adapter(["asks", "asks too"], [0.5, 0.5], "mean")
    try:
        with pytest.raises(InputError, match="Expected acts_from, the place"):
            mixed(tokens(), adapter_names=["mean"] * 3)
        mixed.set_adapter("mean")
        with pytest.raises(InputError, match="Expected acts_from, the place"):
            mixed(tokens())
    finally:
        mixed.set_adapter("asks")
        mixed.delete_adapter("mean")


def test_a_bank_holds_adapters_of_both_kinds(tmp_path):
    model, ids, starts = adapted("llama"), tokens(), [2, 4, 6]
    model.save_pretrained(tmp_path / "asks")
    other = IA3Model(tiny.build("llama"), IA3Config(task_type="CAUSAL_LM"))
    tiny.randomize(other, 5)
    other.save_pretrained(tmp_path / "reads")
    with torch.no_grad():
        asks, reads = model(ids, acts_from=starts).logits, other(ids).logits
    served = IA3Model(tiny.build("llama"), {})
    bank = AdapterBank(served, IA3Config(task_type="CAUSAL_LM"), budget="60KB")
    bank.register(tmp_path)

    def check(served, names=("asks", "reads", "__base__")):
        with torch.no_grad():
            found = served(ids, adapter_names=list(names), acts_from=starts).logits
        for row, name in enumerate(names):
            if name != "__base__":
                expected = asks if name.startswith("asks") else reads
                assert tiny.relative_error(found[row], expected[row]) < 2e-6

    check(served)
    assert [bank.acts_from(name) for name in ("asks", "reads")] == ["question", "start"]
    with pytest.raises(InputError, match="Expected acts_from, the place"):
        served(ids, adapter_names=["asks"] * 3)
    with pytest.raises(InputError, match="found both; write an archive of each"):
        bank.save_archive(tmp_path / "archive")
    bank.save_archive(tmp_path / "archive", ["asks"])
    again = IA3Model(tiny.build("llama"), {})
    AdapterBank(again, IA3Config(task_type="CAUSAL_LM")).load_archive(tmp_path / "archive")
    check(again, ("asks",) * 3)
    last = IA3Model(tiny.build("llama"), {})
    AdapterBank(last, IA3Config(task_type="CAUSAL_LM")).load(tmp_path / "asks")
    shutil.rmtree(tmp_path / "asks")
    check(last, ("asks",) * 3)  # what is in memory does not need its folder


@pytest.mark.parametrize("arch", ["t5", "bart"])
class TestEncoderDecoders:
    """The encoder reads as the base model does; vectors act in the decoder."""

    def build(self, arch: str, names=("asks",), **fields):
        config = {"task_type": "SEQ_2_SEQ_LM", "acts_from": "question", **fields}
        model = IA3Model(tiny.build(arch), {name: IA3Config(**config) for name in names})
        for seed, name in enumerate(names):
            tiny.randomize(model, seed + 1, name)
        return model

    def start(self, arch: str, model, name: str = "asks"):
        """A model whose adapter acts from the start, with the same vectors in the decoder and ones in the encoder."""
        other = IA3Model(tiny.build(arch), IA3Config(task_type="SEQ_2_SEQ_LM"))
        with torch.no_grad():
            for path, layer in model.ia3_layers.items():
                if name in layer.held:
                    other.ia3_layers[path].ia3_l["default"].copy_(layer.ia3_l[name])
        return other

    def mixed(self, arch: str):
        model = self.build(arch, ("asks", "asks too"))
        model.add_adapter("reads", IA3Config(task_type="SEQ_2_SEQ_LM"))
        tiny.randomize(model, 7, "reads")
        return model

    @torch.no_grad()
    def test_vectors_act_in_the_decoder_alone(self, arch):
        model = self.build(arch)
        names = {name.split(".layers.0.")[-1].split(".layer.0.")[-1] for name in model.ia3_layers}
        assert any(name.startswith(("SelfAttention", "self_attn")) for name in names)
        assert any("EncDecAttention" in name or "encoder_attn" in name for name in model.ia3_layers)
        assert any(name.endswith(("wo", "fc2")) for name in model.ia3_layers)
        assert all(".decoder." in f".{name}" for name in model.ia3_layers)
        whole, inputs = self.start(arch, model), tiny.batch(arch)
        found = model(**inputs).logits
        assert tiny.relative_error(found, whole(**inputs).logits) < 1e-6
        with model.disable_adapter():
            base = model(**inputs).logits
        assert torch.equal(base, tiny.build(arch)(**inputs).logits)
        assert tiny.relative_error(found, base) > 1e-3
        states = tiny.build(arch).get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        asked = {key: value for key, value in inputs.items() if key != "input_ids"}
        assert tiny.relative_error(model(encoder_outputs=states, **asked).logits, found) < 1e-6

    @torch.no_grad()
    @pytest.mark.parametrize("beams", [1, 2])
    def test_generation(self, arch, beams):
        model, inputs = self.mixed(arch), tiny.batch(arch)
        inputs.pop("labels")
        options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None}
        expected = self.start(arch, model).generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options), expected)
        names = ["asks", "reads", "asks"]
        found = model.generate(**inputs, adapter_names=names, **options)
        for name in names:
            model.set_adapter(name)
            alone = model.generate(**inputs, **options)
            for row in range(3):
                assert names[row] != name or torch.equal(found[row], alone[row])

    @torch.no_grad()
    def test_rows_of_both_kinds_in_one_batch(self, arch):
        model = self.mixed(arch)
        names = ["asks", "reads", "__base__", "asks too", "reads", "asks"]
        inputs = tiny.batch(arch, rows=len(names))
        found = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            model.ia3_routing.switch(active=() if name == "__base__" else (name,))
            assert tiny.relative_error(found[row], model(**inputs).logits[row]) < 2e-6

    def test_no_place_is_taken(self, arch):
        model = self.build(arch)
        for names in (None, ["asks"] * 3):
            with pytest.raises(InputError, match="Expected no acts_from for an encoder-decoder, found"):
                model(**tiny.batch(arch), adapter_names=names, acts_from=[1, 2, 3])
        assert model.ia3_routing.rows is None

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_merging_is_refused(self, arch, merge):
        model = self.build(arch)
        before = tiny.state(model)
        with pytest.raises(
            InputError, match="found 'asks', which acts from the question on: such adapters stay beside"
        ):
            getattr(model, merge)()
        assert tiny.same_bits(tiny.state(model), before)

    def test_a_folder_comes_back_and_peft_refuses_it(self, arch, tmp_path):
        model, inputs = self.build(arch, ("default",)), tiny.batch(arch)
        model.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (written["peft_type"], written["acts_from"]) == ("IA3_FROM_QUESTION", "question")
        assert "in the decoder alone" in (tmp_path / "README.md").read_text()
        assert written["target_modules"] == sorted(tiny.TARGETS[arch][0])  # the decoder's, as `acts_from` says
        again = PeftModel.from_pretrained(tiny.build(arch), tmp_path)
        assert sorted(again.base_model.ia3_layers) == sorted(model.ia3_layers)
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        with pytest.raises(KeyError, match="IA3_FROM_QUESTION"):
            peft.PeftModel.from_pretrained(tiny.build(arch), tmp_path)

    def test_a_weighted_adapter(self, arch, tmp_path):
        model, inputs = self.build(arch, ("asks", "asks too")), tiny.batch(arch)
        model.add_weighted_adapter(["asks", "asks too"], [1.0, 0.0], "default")
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        again = PeftModel.from_pretrained(tiny.build(arch), tmp_path)
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)

    @torch.no_grad()
    @pytest.mark.parametrize("holds", ["both kinds", "the question's kind"])
    def test_a_bank(self, arch, holds, tmp_path):
        asks, inputs = self.build(arch, ("default",)), tiny.batch(arch, rows=3)
        reads = IA3Model(tiny.build(arch), IA3Config(task_type="SEQ_2_SEQ_LM"))
        tiny.randomize(reads, 5)
        asks.save_pretrained(tmp_path / "folders" / "asks")
        reads.save_pretrained(tmp_path / "folders" / "reads")
        both, base = holds == "both kinds", tiny.build(arch)(**inputs).logits
        expected = {"asks": asks(**inputs).logits, "reads": reads(**inputs).logits, "__base__": base}
        config = IA3Config(task_type="SEQ_2_SEQ_LM", acts_from="start" if both else "question")

        def bank_of(**options):
            return AdapterBank(IA3Model(tiny.build(arch), {}), config, **options)

        def check(bank, names):
            model = bank_model[bank]
            found = model(**inputs, adapter_names=list(names)).logits
            for row, name in enumerate(names):
                assert tiny.relative_error(found[row], expected[name][row]) < 2e-6
                assert model.waits_for_question([name]) is (name == "asks")

        bank_model = {}
        served = IA3Model(tiny.build(arch), {})
        bank = AdapterBank(served, config, budget=2 * AdapterBank(served, config).statistics.row_bytes)
        bank_model[bank] = served
        bank.register(tmp_path / "folders")
        check(bank, ("asks", "__base__", "asks"))
        if both:
            check(bank, ("reads", "__base__", "reads"))  # and "asks" makes room
            check(bank, ("asks", "__base__", "asks"))
            bank.link(tmp_path / "folders" / "asks", "again")
        else:
            with pytest.raises(InputError, match=r"reads.*encoder"):
                bank.gather(["reads"])
        bank.save_archive(tmp_path / "archive", ["asks"])
        again = IA3Model(tiny.build(arch), {})
        last = AdapterBank(again, config)
        bank_model[last] = again
        last.load_archive(tmp_path / "archive")
        check(last, ("asks", "asks", "__base__"))

    def test_a_bank_refuses_an_adapter_that_says_one_kind_and_is_of_the_other(self, arch, tmp_path):
        reads = IA3Model(tiny.build(arch), IA3Config(task_type="SEQ_2_SEQ_LM"))
        tiny.randomize(reads, 5)
        reads.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        config = json.loads(path.read_text()) | {"peft_type": "IA3_FROM_QUESTION", "acts_from": "question"}
        path.write_text(json.dumps(config))
        bank = AdapterBank(IA3Model(tiny.build(arch), {}), IA3Config(task_type="SEQ_2_SEQ_LM"))
        with pytest.raises(InputError, match="encoder"):
            bank.load(tmp_path, "wrong")
        with pytest.raises(InputError, match="encoder"):
            bank.link(tmp_path, "wrong")
        with pytest.raises(InputError, match="encoder"):
            PeftModel.from_pretrained(tiny.build(arch), tmp_path)
