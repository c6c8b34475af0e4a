"""PReL with a teacher that is not its network: who labels, and what is compared with what. Its other proofs: test_prel.

After a first stage as short as those of tests a best-model average still equals its network, so that a labeler that is
the wrong one of the two would label alike. Here the averages of the first stage are others.
"""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import LABELS, PATTERNS, REGIONS, assert_same_weights, draw_batches, initialized, make_trainer, weights
from test_terms import area_contrast, change
from toy import refusal

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL

pytestmark = pytest.mark.usefixtures("groups")


@pytest.fixture
def first_stage():
    """The joint checkpoint of a first stage, with averages of its own and T1 as the better modality."""
    first = initialized(LABELS, "2d", num_epochs=1)
    first.run_training()
    file = Path(first.output_folder) / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    for name, state in checkpoint["method"]["teachers"].items():
        averaged = first.teachers[name].network
        change(averaged)
        state["weights"] = averaged.state_dict()
        state["best_dice"] = {"FLAIR": [0.4], "T1": [0.6]}[name]
    torch.save(checkpoint, file)
    return checkpoint


def networks_and_averages(checkpoint):
    networks = {name: state["network_weights"] for name, state in checkpoint["modalities"].items()}
    return networks, {name: state["weights"] for name, state in checkpoint["method"]["teachers"].items()}


def test_labeler_is_the_average_and_not_the_network(first_stage):
    networks, averages = networks_and_averages(first_stage)
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL, num_epochs=1)
    trainer.on_train_start()
    assert trainer.better_modality == "T1"
    assert_same_weights(weights(trainer), networks.values())
    assert_same_weights([trainer.labeler.network.state_dict()], [averages["T1"]])
    assert_same_weights([trainer.better_weights], [networks["T1"]])  # what may be given back is the network


def test_a_named_modality_labels_whatever_was_measured(first_stage):
    """Nor does it matter then whether validation cases have foreground."""
    networks, averages = networks_and_averages(first_stage)
    options = {"num_epochs": 1, "teaching_modality": "FLAIR"}
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL, **options)
    trainer._require_foreground = None
    trainer.on_train_start()
    assert_same_weights([trainer.labeler.network.state_dict()], [averages["FLAIR"]])
    assert_same_weights([trainer.better_weights], [networks["FLAIR"]])
    assert [t.name for t in trainer.learners()] == ["T1"]
    assert "The better modality is FLAIR (named by teaching_modality; mean of" in Path(trainer.log_file).read_text()


@pytest.mark.parametrize(
    ("flair", "t1", "better"),
    [([], [], "FLAIR"), ([0.0], [0.0], "FLAIR"), ([], [0.1], "T1"), ([0.0, 0.3], [0.2], "T1")],
)
def test_first_modality_labels_where_none_has_found_anything(results, first_stage, flair, t1, better):
    """A network that never had a validation Dice counts as 0."""
    _, averages = networks_and_averages(first_stage)
    file = results / LABELS / "nnUNetTrainerSemiCML__nnUNetPlans__2d" / "fold_0" / "checkpoint_final.pth"
    for name, pool in (("FLAIR", flair), ("T1", t1)):
        first_stage["method"]["teachers"][name]["best_dice"] = pool
    torch.save(first_stage, file)
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL, num_epochs=1)
    trainer.on_train_start()
    assert trainer.better_modality == better
    assert_same_weights([trainer.labeler.network.state_dict()], [averages[better]])
    assert ("first one teaches" in Path(trainer.log_file).read_text()) is not any([*flair, *t1])


def test_labeler_is_the_average_also_in_a_continued_training(first_stage):
    networks, averages = networks_and_averages(first_stage)
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL, num_epochs=1)
    trainer.run_training()
    continued = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL, num_epochs=1)
    continued.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    assert continued.better_modality == "T1"
    assert_same_weights([continued.labeler.network.state_dict()], [averages["T1"]])
    assert_same_weights([continued.better_weights], [networks["T1"]])


def started(results, dataset, configuration, **options):
    """A second stage that is not asked where its networks come from, with a labeler of other weights than T1's."""
    model = results / dataset / f"nnUNetTrainerSemiCMLPReL__nnUNetPlans__{configuration}"
    (model / "fold_0").mkdir(parents=True)
    (model / "fold_0" / "checkpoint_latest.pth").touch()
    trainer = initialized(dataset, configuration, nnUNetTrainerSemiCMLPReL, num_epochs=5, **options)
    trainer._set_labeler("T1", trainer.trainers[1].network.state_dict())
    change(trainer.labeler.network)
    trainer.current_epoch = 4  # all learn
    return trainer


@pytest.mark.parametrize(("dataset", "configuration"), [(LABELS, "2d"), (REGIONS, "3d_fullres"), (PATTERNS, "2d")])
def test_pseudo_labels_are_those_of_the_labeler(results, dataset, configuration):
    """Its mean over four passes of images with noise between 0 and 0.2, of T1's patches; the networks see no noise."""
    trainer = started(results, dataset, configuration)
    (batch,) = draw_batches(trainer, 1)
    for draw, patches in zip(trainer.unlabeled_draws(batch), batch["unlabeled"], strict=True):
        image = patches["images"]["T1"]
        torch.manual_seed(1)
        (seen,), found = trainer.views_and_targets(draw, {})
        assert seen.keys() == patches["images"].keys()
        assert all(torch.equal(seen[name], patches["images"][name]) for name in seen)
        torch.manual_seed(1)
        passes = []
        with torch.no_grad():
            for _ in range(4):
                noise = (0.1 * torch.randn_like(image)).clamp(0.0, 0.2)
                std = image.flatten(1).std(1).reshape(-1, *[1] * (image.ndim - 1))
                logits = trainer.labeler.network(image + std * noise)
                passes.append(logits.sigmoid() if trainer.label_manager.has_regions else logits.softmax(1))
            of_network = trainer.trainers[1].network(image)[0]
        torch.testing.assert_close(found, torch.stack(passes).mean(0))
        assert (logits - of_network).abs().max() > 0.1


class Stored:
    """In the place of nnU-Net's dataset: cases and where they have foreground."""

    locations: ClassVar[dict] = {}

    def __init__(self, folder, identifiers):
        self.identifiers = identifiers

    def load_case(self, case):
        assert case in self.identifiers
        return None, None, None, {"class_locations": self.locations[case]}


@pytest.mark.parametrize(
    ("first", "second", "locations", "named"),
    [
        (["a", "b"], ["a", "b"], {"a": {1: [], 2: []}, "b": {1: [], 2: []}}, "a, b"),
        (["a", "b"], ["a", "b"], {"a": {1: [], 2: []}, "b": {1: [], 2: [[0, 1, 1]]}}, None),
        (["a"], ["a"], {"a": {(1, 2): [[0, 1, 1]]}}, None),  # a region
        (["a"], ["a"], {"a": {1: [], (-1, 0, 1): [[0, 1, 1]]}}, "a"),  # what is annotated, around an ignore label
        # of different cases those that all modalities have
        (["a", "b"], ["b", "c"], {"a": {1: [[0, 1, 1]]}, "b": {1: []}, "c": {1: [[0, 1, 1]]}}, "b"),
        (["b"], ["a", "c"], {"a": {1: [[0, 1, 1]]}, "b": {1: []}, "c": {1: []}}, None),
        (["b"], ["a", "c"], {"a": {1: []}, "b": {1: []}, "c": {1: []}}, "a, b, c"),
    ],
)
def test_better_modality_is_not_chosen_by_validation_without_foreground(results, first, second, locations, named):
    trainer = started(results, LABELS, "2d")
    for t, cases in zip(trainer.trainers, (first, second), strict=True):
        t.do_split = lambda cases=cases: ([], cases)
        t.dataset_class = type("Stored", (Stored,), {"locations": locations})
    if named is None:
        trainer._require_foreground()
    else:
        assert refusal(trainer._require_foreground) == (
            f"validation cases of fold 0 of Dataset500_Labels: found no foreground in {named}; expected some, since "
            "the modality with the better validation Dice becomes the teacher. Train another fold, or edit "
            "splits_final.json."
        )


@pytest.mark.parametrize("asc_cases", [None, 2, 3])
@pytest.mark.parametrize(("dataset", "configuration"), [(LABELS, "2d"), (REGIONS, "3d_fullres")])
def test_terms_compare_and_contrast_probabilities(results, dataset, configuration, asc_cases):
    """Of 2 unlabeled cases in the batch; cases beyond it, which `asc_cases` adds, are contrasted and nothing else."""
    options = {"asc_temperature": 0.5, "asc_cases": asc_cases, "unlabeled_batch_size": 2}
    trainer = started(results, dataset, configuration, **options)
    regions, heads = trainer.label_manager.has_regions, trainer.label_manager.num_segmentation_heads
    torch.manual_seed(0)
    shape = (asc_cases or 2, heads, *[6] * len(trainer.configuration_manager.patch_size))
    outputs = {t.name: torch.randn(shape) for t in trainer.trainers}
    q = torch.randn(shape).sigmoid() if regions else torch.randn(shape).softmax(1)
    foreground = q if regions else q[:, 1:]
    expected = {}
    for name, z in outputs.items():
        p = z.sigmoid() if regions else z.softmax(1)
        entropy = -(q * p.log() + (1 - q) * (1 - p).log()) if regions else -(q * p.log()).sum(1)
        p = p if regions else p[:, 1:]
        axes = (0, 2, 3) if configuration == "2d" else (2, 3, 4)  # the plans say batch Dice for 2d alone
        overlap, areas = (p * foreground)[:2].sum(axes), (p**2 + foreground**2)[:2].sum(axes)
        expected[f"{name} asc"] = area_contrast([foreground, p], 0.5)
        expected[f"{name} ce"] = entropy[:2].mean()
        expected[f"{name} dice"] = 1 - ((2 * overlap + 1) / (areas + 1)).mean()
    torch.testing.assert_close(trainer.unsupervised_terms([outputs], q), expected)


@pytest.mark.parametrize(
    ("num_epochs", "join_fraction", "joins_at"), [(10, 0.2, 8), (7, 0.2, 6), (1, 0.2, 1), (4, 1.0, 0), (4, 0.0, 4)]
)
def test_better_modality_joins_for_the_last_share_of_the_epochs(results, num_epochs, join_fraction, joins_at):
    """At most; where the share is no whole number of epochs it rests for one more."""
    trainer = started(results, LABELS, "2d", join_fraction=join_fraction)
    trainer.num_epochs = num_epochs
    learning = []
    for trainer.current_epoch in range(num_epochs):
        learning.append([t.name for t in trainer.learners()])
    assert learning == [["FLAIR"] if epoch < joins_at else ["FLAIR", "T1"] for epoch in range(num_epochs)]
