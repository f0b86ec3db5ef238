"""Random sequences of what one can do with adapters: ours and PEFT's answer the same after every step."""

import warnings

import peft
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch import nn

import ia3
from support import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:Adapter cannot be set when the model is merged",
    "ignore:Unmerge result can be inaccurate",
    "ignore:All adapters are already merged",
    "ignore:Already following adapters were merged",
)

NAMES = ("one", "two", "three", "four")
CHOICES = (
    {"target_modules": ["key", "value", "second"], "feedforward_modules": ["second"]},  # often
    {"target_modules": ["key", "value", "second"], "feedforward_modules": ["second"]},
    {"target_modules": ["key", "second"], "feedforward_modules": ["second"]},
    {"target_modules": ["value"], "feedforward_modules": []},
    {"target_modules": ["key", "value"], "feedforward_modules": [], "modules_to_save": ["head"]},
)
EVERYTHING = CHOICES[0]


class Network(nn.Module):
    """Small enough for thousands of steps: keys, values and a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.key, self.value = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x + torch.tanh(self.key(x)) * self.value(x)
        return self.head(x + self.second(torch.relu(self.first(x))))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class BesidePeft(RuleBasedStateMachine):
    """Where PEFT errs, the step leaves the case out or puts PEFT's model right."""

    def __init__(self) -> None:
        super().__init__()
        self.models = []
        for library in (ia3, peft):
            base = Network().eval()
            config = library.IA3Config(**EVERYTHING)
            model = library.get_peft_model(base, config, adapter_name="one").eval()
            model.add_adapter("two", library.IA3Config(**EVERYTHING))
            self.models.append(model)
        self.ours, self.theirs = self.models
        self.fields = {"one": EVERYTHING, "two": EVERYTHING}
        self.plain = Network().eval()(X).detach()
        self.off = self.frozen = False
        for seed, name in enumerate(self.fields):
            self.randomize(name, seed)

    def randomize(self, name: str, seed: int) -> None:
        for model in self.models:
            tiny.randomize(model, seed, name)

    def both(self, call) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for model in self.models:
                call(model)

    @property
    def names(self) -> list[str]:
        return list(self.fields)

    @property
    def merged(self) -> bool:
        return bool(self.ours.ia3_routing.merged)

    # PEFT switches a head that is added while adapters are off on.
    @precondition(lambda self: len(self.fields) < 4 and not self.merged and not self.off)
    @rule(choice=st.integers(0, len(CHOICES) - 1), seed=st.integers(0, 50))
    def add_adapter(self, choice, seed):
        name = next(name for name in NAMES if name not in self.fields)
        fields = CHOICES[choice]
        self.ours.add_adapter(name, ia3.IA3Config(**fields))
        self.theirs.add_adapter(name, peft.IA3Config(**fields))
        self.fields[name] = fields
        self.randomize(name, seed)

    @precondition(lambda self: self.fields and not self.merged)
    @rule(data=st.data())
    def set_adapter(self, data):
        name = data.draw(st.sampled_from(self.names))
        self.both(lambda model: model.set_adapter(name))
        self.frozen = False

    @precondition(lambda self: self.fields and not self.merged)
    @rule(data=st.data(), frozen=st.booleans())
    def set_several(self, data, frozen):
        names = data.draw(st.lists(st.sampled_from(self.names), min_size=1, unique=True))
        if sum("modules_to_save" in self.fields[name] for name in names) > 1:
            return  # PEFT has one head at a time
        self.both(lambda model: model.base_model.set_adapter(names, inference_mode=frozen))
        self.frozen = frozen

    @precondition(lambda self: len(self.fields) > 1 and not self.merged)
    @rule(data=st.data())
    def delete_adapter(self, data):
        name = data.draw(st.sampled_from(self.names))
        left = [other for other in self.ours.active_adapters if other != name]
        gone = name in self.ours.active_adapters
        if gone:  # PEFT cannot delete one of several that are active when another of them has a head
            self.theirs.set_adapter(name)
        self.both(lambda model: model.delete_adapter(name))
        del self.fields[name]
        if gone:
            self.frozen = False
            assert self.ours.active_adapters == (left or self.names[:1])
            # PEFT decides in each layer by itself, by the alphabet, and thaws vectors but no heads.
            self.theirs.base_model.set_adapter(left or self.names[0])

    @precondition(lambda self: len(self.fields) > 1 and "sum" not in self.fields and not self.merged)
    @rule(data=st.data(), weights=st.tuples(st.floats(0.25, 2, width=16), st.floats(0.25, 2, width=16)))
    def add_weighted_adapter(self, data, weights):
        pair = data.draw(st.lists(st.sampled_from(self.names), min_size=2, max_size=2, unique=True))
        if any(self.fields[name]["target_modules"] != self.fields[pair[0]]["target_modules"] for name in pair):
            return
        if any("modules_to_save" in self.fields[name] for name in pair):
            return
        self.both(lambda model: model.base_model.add_weighted_adapter(pair, list(weights), "sum"))
        self.both(lambda model: model.set_adapter("sum"))
        self.frozen = False
        self.fields["sum"] = self.fields[pair[0]]

    @rule(often=st.integers(0, 3))
    def disable(self, often):
        if often:
            return  # much else cannot be compared meanwhile
        self.both(lambda model: model.base_model.disable_adapter_layers())
        self.off = True

    @precondition(lambda self: self.off)
    @rule()
    def enable(self):
        self.both(lambda model: model.base_model.enable_adapter_layers())
        self.off = False
        if self.frozen:  # PEFT thaws the active adapters when they are switched on again, whoever froze them
            self.theirs.base_model.set_adapter(self.theirs.base_model.active_adapters, inference_mode=True)
        merged = list(self.ours.ia3_routing.merged)
        if merged:  # PEFT unmerges
            self.theirs.base_model.merge_adapter(merged)

    @precondition(lambda self: self.fields and not self.merged and not self.off)
    @rule(often=st.integers(0, 2))
    def merge(self, often):
        if often:
            return
        self.both(lambda model: model.base_model.merge_adapter())

    # Of modules that what is merged leaves alone, and of heads, PEFT goes on using the active adapter.
    @precondition(lambda self: self.names and not self.off)
    @rule(data=st.data())
    def merge_by_name(self, data):
        name = data.draw(st.sampled_from(self.names))
        merged = [*self.ours.ia3_routing.merged, name]
        headless = not any("modules_to_save" in fields for fields in self.fields.values())
        if headless and all(self.fields[each] == EVERYTHING for each in merged):
            self.both(lambda model: model.base_model.merge_adapter([name]))

    @precondition(lambda self: self.merged and not self.off)
    @rule()
    def unmerge(self):
        self.both(lambda model: model.base_model.unmerge_adapter())

    @rule(data=st.data())
    def mix(self, data):
        """Each row as under its adapter alone, which the invariants hold against PEFT's."""
        names = data.draw(st.lists(st.sampled_from([*self.names, "__base__"]), min_size=4, max_size=4))
        if self.merged:
            with pytest.raises(ia3.InputError, match="merged into the weights"):
                self.ours(X, adapter_names=names)
            return
        found = self.ours(X, adapter_names=names).detach()
        active = self.ours.ia3_routing.active
        for row, name in enumerate(names):
            self.ours.ia3_routing.switch(active=() if name == "__base__" else (name,))
            torch.testing.assert_close(found[row], self.ours(X)[row].detach(), rtol=1e-4, atol=1e-5)
        self.ours.ia3_routing.switch(active=active)
        if self.off or {*names} == {"__base__"}:
            torch.testing.assert_close(found, self.plain, rtol=1e-4, atol=1e-5)

    @invariant()
    def outputs_are_pefts(self):
        found = self.ours(X).detach()
        if self.off:
            assert torch.equal(found, self.plain)
            if self.merged:
                return  # PEFT unmerges for good and by division
        torch.testing.assert_close(found, self.theirs.base_model(X).detach(), rtol=1e-3, atol=1e-3)

    @invariant()
    def what_is_trainable_is_pefts(self):
        if self.off:
            return  # PEFT freezes adapters for that time
        found, expected = (
            {name for name, parameter in tiny.parameters(model).items() if parameter.requires_grad}
            for model in self.models
        )
        assert found == expected

    @invariant()
    def names_are_pefts(self):
        assert list(self.ours.peft_config) == self.names == list(self.theirs.peft_config)
        assert self.ours.active_adapters == list(self.theirs.base_model.active_adapters)
        for name in self.names:
            assert list(tiny.adapter_parameters(self.ours, name)) == list(tiny.adapter_parameters(self.theirs, name))


def test_any_sequence_of_steps_is_pefts():
    run_state_machine_as_test(
        BesidePeft,
        settings=settings(
            max_examples=120, stateful_step_count=16, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        ),
    )
