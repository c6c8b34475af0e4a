"""Hyper-parameters: the published values, and the tables of docs/methods/, which say what the trainers have."""

import re
import runpy
from pathlib import Path

import pytest

from nnunetv2_semicml.ext_trainers import semicml_trainers

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted((DOCS / "methods").glob("*.md"))
OFFERED = [name for name in semicml_trainers.__all__ if not name.endswith("epochs")]
# trainer -> as its paper or published code has it; where nnU-Net's loss or schedule asks for another scale, scaled
PUBLISHED = {
    "nnUNetTrainerSemiCML": {
        "mse_weight": 1,
        "asc_weight": 3.5 / 10,
        "asc_temperature": 1,
        "teacher_averaging": "bma",
        "bma_pool_size": 6,
        "bma_start_epoch": 10,
    },
    "nnUNetTrainerSemiCMLPReL": {
        "asc_share": 0.1,
        "asc_share_better": 0.2,
        "join_fraction": 0.2,
        "teacher_passes": 4,
        "noise_std": 0.1,
        "noise_bounds": (0, 0.2),
    },
    "nnUNetTrainerBCP": {
        "box_side": 2 / 3,
        "labeled_weight_in_mixtures": 1,
        "pseudo_label_weight": 0.5,
        "largest_component": True,
        "warmup_fraction": 10000 / 40000,
        "supervised_weight_after_warmup": 0,
        "rampup_fraction": 0,
        "noise_std": 0,
        "teacher_averaging": "ema",
        "ema_decay": 0.99,
    },
    "nnUNetTrainerFixMatch": {
        "strong_weight": (1 / 2) / (1 / 4),
        "sure_from": 0.95,
        "box_probability": 0.5,
        "box_shares": (0.02, 0.4),
        "rampup_fraction": 0,
        "teacher_averaging": None,
    },
    "nnUNetTrainerUniMatch": {
        "strong_weight": (1 / 4 + 1 / 4) / 2 / (1 / 4),
        "feature_weight": (1 / 2) / 2 / (1 / 4),
        "feature_dropout": 0.5,
        "strong_views": 2,
        "sure_from": 0.95,
        "box_probability": 0.5,
        "box_shares": (0.02, 0.4),
        "rampup_fraction": 0,
    },
    "nnUNetTrainerFilterMatch": {
        "warmup_fraction": 20 / 300,
        "mirror_from": 100 / 300,
        "filter_interval": 100 / 300,
        "filtered_share": 0.15,
    },
    "nnUNetTrainerMeanTeacher": {"teacher_averaging": "ema", "deploy_average": True},
    "nnUNetTrainerUAMT": {
        "consistency_weight": 0.1 / (1 / 2),
        "rampup_fraction": 1,
        "uncertainty_passes": 8,
        "teacher_averaging": "ema",
    },
}


@pytest.mark.parametrize(
    ("trainer", "attribute", "value"), [(t, a, v) for t, settings in PUBLISHED.items() for a, v in settings.items()]
)
def test_setting_is_as_published(trainer, attribute, value):
    assert getattr(getattr(semicml_trainers, trainer), attribute) == value


@pytest.mark.parametrize("attribute", ["asc_weight", "asc_temperature", "asc_cases"])
def test_contrast_of_plus_is_that_of_semicml(attribute):
    plus, semicml = semicml_trainers.nnUNetTrainerSemiCMLPlus, semicml_trainers.nnUNetTrainerSemiCML
    assert getattr(plus, attribute) == getattr(semicml, attribute)


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(DOCS / "hyper_parameters.py"))


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_page_is_current(page, script):
    """Otherwise: make docs."""
    text = page.read_text(encoding="utf-8")
    assert script["filled"](text) == text


def test_every_trainer_has_a_page_and_a_line_in_the_overview():
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    with_tables = re.findall(r"<!-- hyper-parameters: (\w+) -->\n\| attribute", "".join(pages.values()))
    derived = {"nnUNetTrainerSemiCMLPlusPReL"}  # of one that has
    assert sorted(with_tables) == sorted({*OFFERED, "nnUNetTrainerSemiSupervised"} - derived)
    overview = pages[DOCS / "methods" / "README.md"]
    for page in PAGES:
        assert page.name == "README.md" or f"]({page.name})" in overview
    named = "".join(overview.split("|"))
    for trainer in OFFERED:
        assert f"`{trainer}`" in named or f"`…{trainer.removeprefix('nnUNetTrainer')}`" in named


class Described(semicml_trainers.nnUNetTrainerBCP):
    """A method of one's own.

    Attributes:
        box_side: of another
            kind | or not.
        shelf: names.
        unsaid: an attribute without a value here.
    """

    box_side = 1 / 3
    shelf = "top"
    _private = 1


def test_table_says_what_a_trainer_has(script):
    rows = script["table"](Described).splitlines()
    assert "| `box_side` | 1/3 | Of another kind \\| or not. |" in rows
    assert '| `shelf` | "top" | Names. |' in rows
    assert "| `pseudo_label_weight` | 0.5 | Weight of the other region; published, likewise. |" in rows
    names = [row.split("`")[1] for row in rows[2:]]
    assert len(names) == len({*names})
    assert not {"unsaid", "_private", "ema_decay", "term_weights"} & {*names}  # the third is as in every method


def test_a_setting_without_a_word_is_refused(script):
    silent = type("Silent", (semicml_trainers.nnUNetTrainerBCP,), {"shelf": "top"})
    with pytest.raises(KeyError, match="shelf"):
        script["table"](silent)


def test_what_is_left_out_exists(script):
    for name in script["DECLARATIONS"]:
        assert any(hasattr(getattr(semicml_trainers, trainer), name) for trainer in OFFERED)
