"""PReL: pseudo-label re-learning, the second stage of Semi-CML, and its schedules.

Source: Zhang et al., Multi-modal contrastive mutual learning and pseudo-label re-learning for semi-supervised medical
image segmentation, Med. Image Anal. 83:102656, 2023.
"""

from math import ceil
from pathlib import Path
from statistics import fmean

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.file_path_utilities import get_output_folder
from torch import Tensor

from nnunetv2_semicml.data.modality_group import environment_folder
from nnunetv2_semicml.errors import UserError, some_of
from nnunetv2_semicml.losses.asc import AreaSimilarityContrastiveLoss
from nnunetv2_semicml.losses.soft_pseudo_label import confidence, soft_cross_entropy, soft_dice_loss
from nnunetv2_semicml.trainers.checkpoint import load_checkpoint
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import (
    nnUNetTrainerSemiCML,
    nnUNetTrainerSemiCML_5epochs,
    nnUNetTrainerSemiCML_50epochs,
    nnUNetTrainerSemiCML_250epochs,
)
from nnunetv2_semicml.trainers.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.trainers.teacher import Teacher


class nnUNetTrainerSemiCMLPReL(nnUNetTrainerSemiSupervised):
    """The teacher of the better modality labels the unlabeled cases softly, and the networks learn from that.

    The networks and the teachers (best-model averages) are those of a finished run of `first_stage` with the same
    dataset, plans, configuration and fold. The better modality is the one whose best validation Dice values in that
    run, those of its pool, have the highest mean. The other networks learn during the whole stage; that of the better
    modality rests, and joins for the end. If its validation Dice is then lower than at rest, the network of the first
    stage is deployed again; not so with fold "all", whose validation Dice is that of training cases.

    Attributes:
        first_stage: the trainer whose checkpoint_final is the beginning and whose kind of network is trained on.
        better_modality: name of the teacher's modality, known once training has started.
    """

    first_stage: type[nnUNetTrainerSemiCML] = nnUNetTrainerSemiCML
    min_modalities = 2
    compares_modalities = True
    min_unlabeled = 2
    better_modality: str | None = None
    epochs = 600  # published: 31 after 50 of Semi-CML, the same share of nnU-Net's 1000 here

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        # before nnU-Net makes folders: is there anything to start, to continue or to validate?
        if not any(_fold_folder(type(self), plans, configuration, fold).glob("checkpoint_*.pth")):
            _first_stage_checkpoint(self.first_stage, plans, configuration, fold)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.network_trainer = self.first_stage.network_trainer
        # A finished network is refined: a tenth of nnU-Net's rate, with nnU-Net's decay. On validation patients 0.005
        # lowered the better modality and did not measurably lift the other (benchmarks/study/validation.md).
        self.initial_lr = 1e-3
        # Published: 0, which on validation patients was neither better nor worse (ibid.).
        self.supervised_weight = 1.0
        self.pseudo_label_weight = 1.0
        # Published: shares of the ASC loss in that on pseudo-labels of 0.01 to 0.1, and of 0.1 to 0.2 for the better
        # modality.
        self.asc_share = 0.1
        self.asc_share_better = 0.2
        self.asc_temperature = 1.0
        self.join_fraction = 0.2  # published: the better modality learns in the last fifth
        # The validation Dice of fold "all" is that of training cases. On validation patients the networks were as good
        # without the rule (benchmarks/study/validation.md).
        self.may_give_back = fold != "all"
        # Published: four passes, noise N(0, 0.1^2) clamped to [0, 0.2]; here in standard deviations of the image.
        self.teacher_passes = 4
        self.noise_std = 0.1
        self.noise_bounds = (0.0, 0.2)
        self.confidence_weighting = False  # not published: weights voxels by the certainty of their pseudo-label
        self.teacher: Teacher | None = None
        self.better_weights: dict[str, Tensor] = {}
        self.validation_dice: dict[str, float] = {}

    # the stage before

    def on_train_start(self) -> None:
        """Take networks and teacher from the first stage, unless this stage is being continued."""
        if not self.was_initialized:
            self.initialize()
        if self.teacher is None:
            self._start_from_first_stage()
        dice = ", ".join(f"{name} {value:.4f}" for name, value in self.validation_dice.items())
        self.print_to_log_file(
            f"The better modality is {self.better_modality} (mean of the best validation Dice values of "
            f"{self.first_stage.__name__}: {dice}); its teacher makes the pseudo-labels."
        )
        super().on_train_start()

    def _start_from_first_stage(self) -> None:
        file = _first_stage_checkpoint(self.first_stage, self.plans_manager.plans, self.configuration_name, self.fold)
        checkpoint = load_checkpoint(
            str(file),
            self.device,
            {**self.provenance, "trainer": self.first_stage.__name__},
            remedy=f"Train {self.first_stage.__name__} anew for this dataset, plans, configuration and fold.",
        )
        for trainer in self.trainers:
            trainer.unwrapped_network().load_state_dict(checkpoint["modalities"][trainer.name]["network_weights"])
        pools = {name: state["best_dice"] for name, state in checkpoint["method"].items()}
        self._require_foreground()
        # no value at all: validation patches never showed foreground
        self.validation_dice = {name: fmean(dice) if dice else 0.0 for name, dice in pools.items()}
        if not any(self.validation_dice.values()):
            self.print_to_log_file("WARNING: no modality found any foreground in validation; the first one teaches.")
        better = max(self.validation_dice, key=self.validation_dice.get)
        self._set_teacher(better, checkpoint["method"][better]["teacher_weights"])
        self.better_weights = checkpoint["modalities"][better]["network_weights"]

    def _require_foreground(self) -> None:
        """Refuse to choose by the Dice of validation cases without foreground, the same ones for all modalities."""
        validation = {trainer: set(trainer.do_split()[1]) for trainer in self.trainers}
        cases = set.intersection(*validation.values()) or set.union(*validation.values())
        for trainer, of_trainer in validation.items():
            own = sorted(cases & of_trainer)
            dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, own)
            for case in own:
                found = dataset.load_case(case)[3]["class_locations"]
                # nnU-Net's key with -1 is of all annotated voxels, where there is an ignore label
                if any(len(v) for label, v in found.items() if not (isinstance(label, tuple) and -1 in label)):
                    return
        raise UserError(
            f"validation cases of fold {self.fold} of {self.group.dataset_name}",
            f"no foreground in {some_of(sorted(cases))}",
            "some, since the modality with the better validation Dice becomes the teacher",
            "Train another fold, or edit splits_final.json.",
        )

    def _set_teacher(self, modality: str, weights: dict) -> None:
        self.better_modality = modality
        self.teacher = Teacher(self._better_trainer.unwrapped_network(), self._do_i_compile())
        self.teacher.network.load_state_dict(weights)

    @property
    def _better_trainer(self) -> nnUNetTrainer:
        (trainer,) = (t for t in self.trainers if t.name == self.better_modality)
        return trainer

    # the end

    def on_train_end(self) -> None:
        """Keep what the better modality's network has learned, unless its validation Dice fell."""
        dice = self._better_trainer.logger.get_value("mean_fg_dice", step=None)
        at_rest, joined = dice[: self._joining_epoch], dice[self._joining_epoch :]
        if self.may_give_back and joined and at_rest and fmean(joined) < fmean(at_rest):
            self.print_to_log_file(
                f"{self.better_modality}: mean validation Dice {fmean(at_rest):.4f} at rest, {fmean(joined):.4f} since "
                f"it joined; its network is that of {self.first_stage.__name__} again."
            )
            self._better_trainer.unwrapped_network().load_state_dict(self.better_weights)
        super().on_train_end()

    @property
    def _joining_epoch(self) -> int:
        return ceil((1 - self.join_fraction) * self.num_epochs)

    # the method

    def draws(self) -> list[tuple[str, ...]]:
        """Those that show the better modality, from which the others learn."""
        return [draw for draw in super().draws() if self.better_modality in (None, *draw)]

    def learners(self) -> list[nnUNetTrainer]:
        """The weaker modalities, and for the end of the stage all."""
        if self.current_epoch >= self._joining_epoch:
            return self.trainers
        return [t for t in self.trainers if t.name != self.better_modality]

    def unsupervised_targets(self, images: dict[str, Tensor]) -> Tensor:
        """The pseudo-labels (B, heads, *patch)."""
        return self.soft_pseudo_labels(images[self.better_modality])

    def unsupervised_terms(self, outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Area-similarity contrast, cross-entropy and Dice of every learner with the pseudo-labels."""
        regions, batch_dice = self.label_manager.has_regions, self.configuration_manager.batch_dice
        labels = self.in_batch(targets)
        weight = confidence(labels, regions) if self.confidence_weighting else None
        foreground = self.foreground(targets)
        asc_loss = AreaSimilarityContrastiveLoss(self.asc_temperature, distributed=self.is_ddp)
        terms = {}
        for name, logits in outputs.items():
            prediction = self.foreground(self.probabilities(logits))
            terms[f"{name} asc"] = asc_loss([self.contrasted(foreground), self.contrasted(prediction)])
            terms[f"{name} ce"] = soft_cross_entropy(self.in_batch(logits), labels, regions, weight, self.is_ddp)
            terms[f"{name} dice"] = soft_dice_loss(
                self.in_batch(prediction), self.in_batch(foreground), batch_dice, weight, distributed=self.is_ddp
            )
        return terms

    def unsupervised_weights(self) -> dict[str, float]:
        """Share of the contrast and of the two pseudo-label losses for every learner, 0 for a network that rests."""
        learning = [t.name for t in self.learners()]
        weights = {}
        for name in (m.name for m in self.group.modalities):
            total = self.pseudo_label_weight if name in learning else 0.0
            share = self.asc_share_better if name == self.better_modality else self.asc_share
            weights[f"{name} asc"] = total * share
            weights[f"{name} ce"] = weights[f"{name} dice"] = total * (1 - share)
        return weights

    def soft_pseudo_labels(self, image: Tensor) -> Tensor:
        """Mean probabilities of several passes of the teacher over noisy copies of an image.

        Args:
            image: augmented patches (B, C, *patch) of the better modality, the same that its network sees.

        Returns:
            Probabilities (B, heads, *patch) without gradient: softmax with the background, or sigmoid for regions.
        """
        return self.mean_prediction(self.teacher, image, self.teacher_passes, self.noise_std, self.noise_bounds)

    # checkpoints

    def get_method_state(self) -> dict:
        """The teacher, whose it is, the validation Dice that decided so, and the better network as it was given."""
        return {
            "better_modality": self.better_modality,
            "validation_dice": self.validation_dice,
            "teacher_weights": self.teacher.network.state_dict(),
            "better_weights": self.better_weights,
        }

    def set_method_state(self, state: dict) -> None:
        """Restore what `get_method_state` returned."""
        self.validation_dice = state["validation_dice"]
        self.better_weights = state["better_weights"]
        self._set_teacher(state["better_modality"], state["teacher_weights"])


def _fold_folder(trainer: type[nnUNetTrainer], plans: dict, configuration: str, fold: int | str) -> Path:
    environment_folder("nnUNet_results")  # raises if it is not set
    return Path(get_output_folder(plans["dataset_name"], trainer.__name__, plans["plans_name"], configuration, fold))


def _first_stage_checkpoint(trainer: type[nnUNetTrainer], plans: dict, configuration: str, fold: int | str) -> Path:
    folder = _fold_folder(trainer, plans, configuration, fold)
    file = folder / "checkpoint_final.pth"
    if not file.is_file():
        dataset = convert_dataset_name_to_id(plans["dataset_name"])
        command = f"nnUNetv2_train {dataset} {configuration} {fold} -tr {trainer.__name__} -p {plans['plans_name']}"
        begun = any(folder.glob("checkpoint_*.pth"))
        raise UserError(
            file,
            "an unfinished training" if begun else "no such file",
            f"the finished {trainer.__name__} from which this stage starts",
            f"Run first: {command}{' --c' if begun else ''}",
        )
    return file


class nnUNetTrainerSemiCMLPReL_5epochs(nnUNetTrainerSemiCMLPReL):
    """For trying things out, after nnUNetTrainerSemiCML_5epochs."""

    first_stage = nnUNetTrainerSemiCML_5epochs
    epochs = 5


class nnUNetTrainerSemiCMLPReL_50epochs(nnUNetTrainerSemiCMLPReL):
    """After nnUNetTrainerSemiCML_50epochs."""

    first_stage = nnUNetTrainerSemiCML_50epochs
    epochs = 50


class nnUNetTrainerSemiCMLPReL_250epochs(nnUNetTrainerSemiCMLPReL):
    """After nnUNetTrainerSemiCML_250epochs."""

    first_stage = nnUNetTrainerSemiCML_250epochs
    epochs = 250
