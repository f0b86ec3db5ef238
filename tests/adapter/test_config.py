"""`IA3Config` has PEFT's fields, defaults and JSON."""

import json
import warnings
from dataclasses import fields

import peft
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft.utils import constants
from torch import nn

from ia3 import IA3Config, InputError, PeftType, TaskType, get_peft_model
from ia3.files.hub import at_revision

PEFT_TARGETS = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
PEFT_FEEDFORWARD = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING

# Something else than the default in every field.
FULL = {
    "task_type": "SEQ_CLS",
    "peft_type": "IA3",
    "auto_mapping": {"base_model_class": "T5Model", "parent_library": "transformers"},
    "base_model_name_or_path": "owner/base",
    "revision": "abc",
    "inference_mode": True,
    "target_modules": ["v", "k", "wo"],
    "exclude_modules": ["encoder.k", "decoder.k"],
    "feedforward_modules": ["wo"],
    "fan_in_fan_out": True,
    "modules_to_save": ["score", "classifier"],
    "init_ia3_weights": False,
}


def written(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def write(folder, **values) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_fields_order_and_defaults_are_pefts():
    ours = [(field.name, field.default) for field in fields(IA3Config)]
    theirs = [(field.name, field.default) for field in fields(peft.IA3Config) if field.name != "peft_version"]
    assert ours == [*theirs, ("acts_from", "start")]


def test_values_of_a_new_config_are_pefts():
    theirs = peft.IA3Config().to_dict()
    del theirs["peft_version"]
    assert IA3Config().to_dict() == {**theirs, "peft_type": "IA3"}


def test_full_has_every_field_and_no_default():
    """So that the tests below cannot pass by leaving a field out."""
    assert set(FULL) == {field.name for field in fields(IA3Config)} - {
        "acts_from"
    }  # not PEFT's: in test_from_question.py
    assert all(FULL[key] != value for key, value in IA3Config().to_dict().items() if key != "peft_type")


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "feedforward_modules"])
def test_lists_are_kept_as_sets_and_written_as_sorted_lists(kind, field, tmp_path):
    config = IA3Config(**{"target_modules": ["k", "v", "wo"], field: kind(["wo", "k"])})
    assert getattr(config, field) == {"wo", "k"} and isinstance(getattr(config, field), set)
    assert config.to_dict()[field] == ["k", "wo"]
    config.save_pretrained(tmp_path)
    assert written(tmp_path)[field] == ["k", "wo"]


def test_strings_stay_strings():
    config = IA3Config(target_modules=".*(k|v)", exclude_modules="a", feedforward_modules="b")
    assert (config.target_modules, config.exclude_modules, config.feedforward_modules) == (".*(k|v)", "a", "b")


@pytest.mark.parametrize("values", [{}, FULL, {"target_modules": ".*(k|v)"}, {"feedforward_modules": []}])
def test_json_round_trip(values, tmp_path):
    config = IA3Config(**values)
    config.save_pretrained(tmp_path / "new" / "folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert IA3Config.from_pretrained(tmp_path / "new" / "folder") == config
        assert IA3Config.from_pretrained(str(tmp_path / "new"), subfolder="folder") == config
        assert IA3Config.from_dict(config.to_dict()) == config


def without_revision(base):
    return at_revision(base)[1] is None


names = st.lists(st.text("abk._é\"'\\", max_size=5), max_size=4)


@given(names, st.none() | names | st.text(max_size=8), st.none() | st.text(max_size=8).filter(without_revision))
@example([], None, "@")
def test_dictionary_round_trip_of_any_names(targets, excluded, base):
    config = IA3Config(
        target_modules=targets,
        feedforward_modules=targets[:1],
        exclude_modules=excluded,
        base_model_name_or_path=base,
    )
    assert IA3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("values", [{}, FULL, {"target_modules": ".*(k|v)", "feedforward_modules": ".*wo"}])
def test_peft_reads_our_json(values, tmp_path):
    IA3Config(**values).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert theirs == peft.IA3Config(**values)


@pytest.mark.parametrize("values", [{}, FULL, {"target_modules": ".*(k|v)", "feedforward_modules": ".*wo"}])
def test_we_read_pefts_json_without_a_warning(values, tmp_path):
    """Its `peft_version` is no unknown key."""
    peft.IA3Config(**values).save_pretrained(str(tmp_path))
    assert "peft_version" in written(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert IA3Config.from_pretrained(tmp_path) == IA3Config(**values)


def test_json_has_pefts_keys_and_layout(tmp_path):
    IA3Config(**FULL).save_pretrained(tmp_path / "ours")
    peft.IA3Config(**FULL).save_pretrained(str(tmp_path / "theirs"))
    theirs = written(tmp_path / "theirs")
    del theirs["peft_version"]
    expected = {key: sorted(value) if key.endswith("_modules") else value for key, value in theirs.items()}
    text = (tmp_path / "ours" / "adapter_config.json").read_text(encoding="utf-8")
    assert text == json.dumps(expected, indent=2, sort_keys=True)


def test_unknown_keys_are_ignored_with_a_warning_that_names_them(tmp_path):
    write(tmp_path, peft_type="IA3", target_modules=["k"], zeta_scaling=3, alpha_new=None)
    with pytest.warns(UserWarning, match="'alpha_new', 'zeta_scaling'") as caught:
        config = IA3Config.from_pretrained(tmp_path)
    assert config == IA3Config(target_modules=["k"])
    assert len(caught) == 1


@pytest.mark.parametrize("library", [IA3Config, peft.IA3Config])
def test_feedforward_that_is_no_subset_is_refused(library):
    with pytest.raises(ValueError, match="`feedforward_modules` should be a subset of `target_modules`"):
        library(target_modules=["k", "v"], feedforward_modules=["k", "wo"])


def test_the_subset_error_names_what_is_missing():
    with pytest.raises(InputError) as error:
        IA3Config(target_modules=["k", "v"], feedforward_modules=["k", "wo", "fc2"])
    assert "'fc2', 'wo'" in one_line(error)


@pytest.mark.parametrize(
    ("targets", "feedforward"), [("k|wo", ["wo"]), (["k"], ".*wo"), (None, ["wo"]), (["k"], None), (["k"], [])]
)
def test_the_subset_is_asked_only_of_two_lists(targets, feedforward):
    IA3Config(target_modules=targets, feedforward_modules=feedforward)
    peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)


def test_task_types_are_pefts():
    assert {task.name: task.value for task in TaskType} == {task.name: task.value for task in peft.TaskType}


@pytest.mark.parametrize("task", list(TaskType))
def test_task_type_by_name_or_member(task):
    assert IA3Config(task_type=task.value) == IA3Config(task_type=task)
    assert IA3Config(task_type=task.value).task_type is task
    assert IA3Config(task_type=peft.TaskType(task.value)).to_dict()["task_type"] == task.value


@pytest.mark.parametrize("task", ["seq_cls", "CLASSIFY", "", 3, ["SEQ_CLS"]])
def test_bad_task_type_is_refused_with_the_good_ones(task):
    with pytest.raises(InputError) as error:
        IA3Config(task_type=task)
    message = one_line(error)
    assert repr(task) in message
    assert all(good.value in message for good in TaskType)


def test_peft_type_is_always_ia3():
    assert IA3Config().peft_type is PeftType.IA3
    assert IA3Config(peft_type="IA3").peft_type is PeftType.IA3
    assert IA3Config(peft_type=peft.PeftType.IA3).peft_type is PeftType.IA3


@pytest.mark.parametrize("other", ["LORA", "ia3", peft.PeftType.LORA, ""])
def test_other_peft_type_is_refused(other):
    with pytest.raises(InputError, match="IA3"):
        IA3Config(peft_type=other)


def test_a_lora_config_is_refused_by_name(tmp_path):
    peft.LoraConfig(target_modules=["q"]).save_pretrained(str(tmp_path))
    with pytest.raises(InputError) as error:
        IA3Config.from_pretrained(tmp_path)
    assert "'LORA'" in one_line(error)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"peft_type": "IA3", "target_mod', "[]", '"IA3"', "null", '{"model_type": "t5"}', "\x00\x01", "[" * 99],
)
def test_what_is_no_adapter_config_is_refused(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError) as error:
        IA3Config.from_pretrained(tmp_path)
    assert "adapter_config.json" in one_line(error)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError) as error:
        IA3Config.from_pretrained(tmp_path)
    assert "adapter_config.json" in one_line(error)


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": 5},
        {"exclude_modules": True},
        {"feedforward_modules": [["k"]]},
        {"fan_in_fan_out": []},
        {"fan_in_fan_out": None},
        {"inference_mode": "x"},
        {"init_ia3_weights": 1},
        {"modules_to_save": {}},
        {"modules_to_save": "classifier"},
        {"auto_mapping": 3},
        {"auto_mapping": {"base_model_class": ["A"]}},
        {"revision": []},
        {"base_model_name_or_path": 5},
        {"base_model_name_or_path": {"a": "x" * 5000}},
        {"task_type": {}},
    ],
)
def test_json_values_of_a_wrong_type_are_bad_input(values, tmp_path):
    write(tmp_path, peft_type="IA3", **values)
    with pytest.raises(InputError) as error:
        IA3Config.from_pretrained(tmp_path)
    assert next(iter(values)) in one_line(error)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(InputError) as error:
        IA3Config.from_pretrained(tmp_path)
    message = one_line(error)
    assert "adapter_config.json" in message and str(tmp_path) in message


def test_defaults_of_peft_are_known_for_the_architectures_of_peft_only():
    assert set(PEFT_TARGETS) == set(PEFT_FEEDFORWARD)
    with pytest.raises(InputError) as error:
        IA3Config.from_peft_defaults("no_such_architecture")
    message = one_line(error)
    assert "'no_such_architecture'" in message
    assert all(f"'{name}'" in message for name in PEFT_TARGETS)
    assert message.count("'") == 2 * (len(PEFT_TARGETS) + 1)


@pytest.mark.parametrize("model_type", sorted(PEFT_TARGETS))
def test_defaults_of_peft_are_pefts(model_type):
    config = IA3Config.from_peft_defaults(model_type, task_type="CAUSAL_LM")
    assert config.target_modules == set(PEFT_TARGETS[model_type])
    assert config.feedforward_modules == set(PEFT_FEEDFORWARD[model_type])
    assert config.task_type is TaskType.CAUSAL_LM


def test_saving_the_config_is_atomic(tmp_path, monkeypatch):
    """A write that fails leaves the former config and nothing else."""
    IA3Config(target_modules=["k"]).save_pretrained(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        IA3Config(target_modules=["v"]).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    assert written(tmp_path)["target_modules"] == ["k"]


def test_a_config_of_peft_is_told_from_ours():
    theirs = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(InputError, match=r"Expected ia3\.IA3Config, found peft\.IA3Config; import it from ia3"):
        get_peft_model(nn.Linear(2, 2), theirs)
