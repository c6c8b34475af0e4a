"""Every hyper-parameter is what docs/methods says; whatever it does not mention is as in the base of all methods."""

import ast
import re
from pathlib import Path

import pytest

from nnunetv2_semicml.ext_trainers import semicml_trainers
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised

PAGE = (Path(__file__).parents[1] / "docs" / "methods" / "README.md").read_text()
VALUE = r'\(-?[\d.]+, -?[\d.]+\)|\d+/\d+|-?[\d.]+(?:e-?\d+)?|"\w+"|None|on|off'
OFFERED = [name for name in semicml_trainers.__all__ if not name.endswith("epochs")]


def value_of(text):
    if "/" in text:
        return int(text.split("/")[0]) / int(text.split("/")[1])
    return {"on": True, "off": False}[text] if text in ("on", "off") else ast.literal_eval(text)


def stated():
    """Trainer, or "all" -> attribute -> value, of the table of hyper-parameters."""
    table = PAGE.split("| trainer | attributes |\n|---|---|\n")[1].split("\n\n")[0]
    found = {}
    for line in table.splitlines():
        who, what = line.strip("| ").split(" | ", 1)
        names = []
        for name in re.findall(r"`(\S+)`", who):
            (full,) = (n for n in OFFERED if n == name or (name[0] == "…" and n.endswith(name[1:])))
            names.append(full)
        for part, of_part in zip(what.split("the latter", 1), (names or ["all"], names[-1:]), strict=False):
            for attribute, value, anatomical in re.findall(rf"`(\w+)` ({VALUE})(?: \(anatomical: (\S+)\))?", part):
                for name in of_part:
                    own = anatomical if anatomical and name.endswith("Anatomical") else value
                    found.setdefault(name, {})[attribute] = value_of(own.rstrip("."))
    return found


STATED = stated()
SETTINGS = [
    (name, attribute)
    for name, own in STATED.items()
    for attribute in own
    if name != "all" and (name, attribute) != ("nnUNetTrainerSECLAnatomical", "regions_per_axis")  # it has no regions
]


def test_the_table_is_read():
    assert STATED["all"].items() >= {"rampup_fraction": 0.4, "noise_bounds": (-0.2, 0.2), "ema_decay": 0.99}.items()
    assert STATED["nnUNetTrainerSECLAnatomical"]["contrast_weight"] == 0.1
    assert STATED["nnUNetTrainerCrossModalCPS"]["teacher_averaging"] == "ema"
    assert "teacher_averaging" not in STATED["nnUNetTrainerCPS"]
    assert {n for own in STATED.values() for n in own} > {"asc_share_better", "regions_per_axis", "initial_lr"}
    assert len(SETTINGS) > 40


@pytest.mark.parametrize(("trainer", "attribute"), SETTINGS)
def test_hyper_parameter_is_as_stated(trainer, attribute):
    assert getattr(getattr(semicml_trainers, trainer), attribute) == STATED[trainer][attribute]


@pytest.mark.parametrize("attribute", ["asc_weight", "asc_temperature", "asc_cases"])
def test_contrast_of_plus_is_as_above(attribute):
    plus, semicml = semicml_trainers.nnUNetTrainerSemiCMLPlus, semicml_trainers.nnUNetTrainerSemiCML
    assert getattr(plus, attribute) == getattr(semicml, attribute)


@pytest.mark.parametrize("attribute", STATED["all"])
def test_hyper_parameter_of_all_is_as_stated_where_no_trainer_has_its_own(attribute):
    value = STATED["all"][attribute]
    assert getattr(nnUNetTrainerSemiSupervised, attribute) == value
    own = {name for name in OFFERED if attribute in STATED.get(name, {})}
    own |= {"nnUNetTrainerSupervisedEMA"} if attribute == "deploy_average" else set()  # as its name says
    for name in set(OFFERED) - own:
        assert getattr(getattr(semicml_trainers, name), attribute) == value
