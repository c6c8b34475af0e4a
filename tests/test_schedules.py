"""The ramp of the unsupervised weights, and the lengths in which trainers are offered."""

import math
import sys
from types import ModuleType

import pytest

from nnunetv2_semicml.training.schedules import offered_trainers, sigmoid_rampup, with_schedules


def test_rampup():
    assert sigmoid_rampup(0, 10) == sigmoid_rampup(-1, 10) == pytest.approx(math.exp(-5))
    assert sigmoid_rampup(5, 10) == pytest.approx(math.exp(-5 * 0.25))
    assert sigmoid_rampup(0.5, 1) == pytest.approx(math.exp(-5 * 0.25))
    assert sigmoid_rampup(10, 10) == sigmoid_rampup(11, 10) == sigmoid_rampup(0, 0) == sigmoid_rampup(0, -1) == 1.0


@pytest.fixture
def module(monkeypatch):
    """A module of a method, as a user may write it."""
    own = ModuleType("method_of_mine")
    monkeypatch.setitem(sys.modules, own.__name__, own)
    return own


def trainer_in(module, name, bases=(), **members):
    return type(name, bases, {"__module__": module.__name__, "num_epochs": 1000, **members})


def test_variants_differ_in_their_epochs_alone(module):
    trainer = trainer_in(module, "nnUNetTrainerMine", weight=0.5)
    assert with_schedules(trainer) is trainer
    assert trainer.num_epochs == 1000
    assert trainer.schedules.keys() == {5, 50, 250}
    for epochs, variant in trainer.schedules.items():
        assert variant.__name__ == f"nnUNetTrainerMine_{epochs}epochs"
        assert getattr(module, variant.__name__) is variant  # where pickle looks for it
        assert variant.__module__ == "method_of_mine"
        assert variant.__doc__ == f"nnUNetTrainerMine in {epochs} epochs."
        assert variant.__bases__ == (trainer,)
        assert (variant.num_epochs, variant.weight) == (epochs, 0.5)
        assert not hasattr(variant, "first_stage")


def test_variants_of_a_second_stage_go_on_from_those_of_the_first(module):
    first = with_schedules(trainer_in(module, "nnUNetTrainerFirst"))
    second = with_schedules(trainer_in(module, "nnUNetTrainerSecond", first_stage=first))
    assert second.first_stage is first
    assert {epochs: v.first_stage for epochs, v in second.schedules.items()} == first.schedules


def test_first_stage_that_only_inherits_its_variants_is_refused(module):
    first = with_schedules(trainer_in(module, "nnUNetTrainerFirst"))
    derived = trainer_in(module, "nnUNetTrainerDerived", (first,))
    second = trainer_in(module, "nnUNetTrainerSecond", first_stage=derived)
    sentence = "^Decorate nnUNetTrainerDerived, the first stage of nnUNetTrainerSecond, with_schedules, too.$"
    with pytest.raises(TypeError, match=sentence):
        with_schedules(second)
    assert not hasattr(module, "nnUNetTrainerSecond_5epochs")


def test_offered_are_the_methods_that_a_module_defines(module):
    """Not what it imports, what only derives from a method, or is no class."""
    mine = with_schedules(trainer_in(module, "nnUNetTrainerMine"))
    module.nnUNetTrainerMine = mine
    module.nnUNetTrainerDerived = trainer_in(module, "nnUNetTrainerDerived", (mine,))
    other = ModuleType("method_of_others")
    sys.modules[other.__name__] = other
    module.nnUNetTrainerOther = with_schedules(trainer_in(other, "nnUNetTrainerOther"))
    del sys.modules[other.__name__]
    module.number = 5
    names = ["nnUNetTrainerMine", *(f"nnUNetTrainerMine_{n}epochs" for n in (5, 50, 250))]
    assert offered_trainers(module) == {name: getattr(module, name) for name in names}
