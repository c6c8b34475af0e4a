"""PReL: pseudo-label re-learning, the second stage of Semi-CML.

Source: Zhang et al., Multi-modal contrastive mutual learning and pseudo-label re-learning for semi-supervised medical
image segmentation, Med. Image Anal. 83:102656, 2023.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from torch import Tensor

from nnunetv2_semicml.data.checkpoint_file import content_digest
from nnunetv2_semicml.data.environment import environment_folder
from nnunetv2_semicml.data.result_folders import fold_folder, model_folder
from nnunetv2_semicml.errors import UserError, some_of
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.training.area_contrast import WithAreaContrast
from nnunetv2_semicml.training.checkpoint import load_checkpoint
from nnunetv2_semicml.training.conductor import LabeledPatches, UnlabeledDraw, View
from nnunetv2_semicml.training.modality_trainer import ModalityTrainer
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import TeacherState, nnUNetTrainerSemiSupervised
from nnunetv2_semicml.training.schedules import with_schedules
from nnunetv2_semicml.training.teacher import Teacher
from nnunetv2_semicml.training.teaching_modality import WithTeachingModality


@with_schedules
class nnUNetTrainerSemiCMLPReL(WithTeachingModality, WithAreaContrast):
    """The teacher of the better modality labels the unlabeled cases softly, and the networks learn from that.

    Networks, as they were deployed, and teachers are those of a finished run of `first_stage` with the same dataset,
    plans, configuration and fold. The better modality is `teaching_modality` or, if none is named, the one whose best
    validation Dice values in that run have the highest mean. The other networks learn during the whole stage; that of
    the better modality rests, and joins for the end. If its validation Dice is then lower than at rest, the network of
    the first stage is deployed again; not so with fold "all", whose validation Dice is that of training cases.

    Attributes:
        first_stage: the trainer whose checkpoint_final is the beginning and whose kind of network is trained on; any
            one with teachers.
        num_epochs: published: 31 after 50 of Semi-CML, here the same share of nnU-Net's 1000.
        initial_lr: a finished network is refined: a tenth of nnU-Net's rate, with nnU-Net's decay. On validation
            patients 0.005 lowered the better modality and did not measurably lift the other
            (benchmarks/study/validation.md at commit cb2e976).
        supervised_weight: of nnU-Net's loss on labeled cases. Published: 0, which on validation patients was neither
            better nor worse (ibid.).
        pseudo_label_weight: of the terms of a learner, together; published.
        asc_share: of the ASC loss in these. Published: 0.01 to 0.1.
        asc_share_better: the same for the better modality. Published: 0.1 to 0.2.
        join_fraction: last share of the stage, in which the better modality learns, too; published.
        may_give_back: whether its network may be given back; None: unless the fold is "all", whose validation Dice is
            that of training cases. On validation patients the networks were as good without the rule (ibid.).
        teacher_passes: forward passes of the teacher whose mean is the pseudo-label; published.
        noise_bounds: of the images of these. Published: noise N(0, 0.1²) clamped to [0, 0.2]; here in standard
            deviations of the image.
        better_modality: name of the teacher's modality; empty until training starts.
        labeler: its teacher, which makes the pseudo-labels and stays as it is.
    """

    first_stage: type[nnUNetTrainerSemiSupervised] = nnUNetTrainerSemiCML
    num_epochs = 600
    initial_lr = 1e-3
    supervised_weight = 1.0
    pseudo_label_weight = 1.0
    asc_share = 0.1
    asc_share_better = 0.2
    join_fraction = 0.2
    may_give_back: bool | None = None
    teacher_passes = 4
    noise_bounds = (0.0, 0.2)
    makes_pseudo_labels = True
    better_modality = ""
    labeler: Teacher

    # the stage before

    def require_prerequisites(self, plans: dict[str, Any], configuration: str, fold: int | str) -> None:
        """Is there anything to start from, to continue or to validate?"""
        if not any(_fold_folder(type(self), plans, configuration, fold).rglob("checkpoint_*.pth")):
            _first_stage_checkpoint(self.first_stage, plans, configuration, fold)

    def initialize(self) -> None:
        """Build the networks, of the kind of the first stage."""
        if self.network_trainer is nnUNetTrainer:
            self.network_trainer = self.first_stage.network_trainer
        super().initialize()
        self.better_weights: dict[str, Tensor] = {}
        self.validation_dice: dict[str, float] = {}

    def on_train_start(self) -> None:
        """Take networks and teacher from the first stage, unless this stage is being continued."""
        if not self.was_initialized:
            self.initialize()
        if not self.better_modality:
            self._start_from_first_stage()
        dice = ", ".join(f"{name} {value:.4f}" for name, value in self.validation_dice.items())
        named = "named by teaching_modality; " if self.teaching_modality else ""
        self.print_to_log_file(
            f"The better modality is {self.better_modality} ({named}mean of the best validation Dice values of "
            f"{self.first_stage.__name__}: {dice}); its teacher makes the pseudo-labels."
        )
        super().on_train_start()

    def _start_from_first_stage(self) -> None:
        file = _first_stage_checkpoint(self.first_stage, self.plans_manager.plans, self.configuration_name, self.fold)
        checkpoint = load_checkpoint(
            str(file),
            self.device,
            {**self.identity, "trainer": self.first_stage.__name__},
            remedy=f"Train {self.first_stage.__name__} anew for this dataset, plans, configuration and fold.",
        )
        self.first_stage_digest = content_digest(file)
        teachers: dict[str, TeacherState] = checkpoint["method"]["teachers"]
        if not teachers:
            raise UserError(
                file,
                f"a training of {self.first_stage.__name__} without teachers",
                "teachers, of which the better modality's makes the pseudo-labels",
                f'Set teacher_averaging = "ema" in {self.first_stage.__name__} and train it anew.',
            )
        deployed = {
            name: teachers[name]["weights"] if self.first_stage.deploy_average else of_modality["network_weights"]
            for name, of_modality in checkpoint["modalities"].items()
        }
        for trainer in self.trainers:
            trainer.unwrapped_network().load_state_dict(deployed[trainer.name])
        self.start_teachers()
        if self.teaching_modality is None:
            self._require_foreground()
        pools = {trainer.name: teachers[trainer.name]["best_dice"] for trainer in self.trainers}
        # no value at all: validation patches never showed foreground
        self.validation_dice = {name: fmean(dice) if dice else 0.0 for name, dice in pools.items()}
        better = self.teaching(self.validation_dice)
        if better is None:
            self.print_to_log_file("WARNING: no modality found any foreground in validation; the first one teaches.")
            better = self.trainers[0].name
        self._set_labeler(better, teachers[better]["weights"])
        self.better_weights = deployed[better]

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

    def _set_labeler(self, modality: str, weights: dict[str, Tensor]) -> None:
        self.better_modality = modality
        self.labeler = Teacher(self._better_trainer.unwrapped_network(), self._better_trainer._do_i_compile())
        self.labeler.network.load_state_dict(weights)

    @property
    def _better_trainer(self) -> ModalityTrainer:
        (trainer,) = (t for t in self.trainers if t.name == self.better_modality)
        return trainer

    # the end

    def on_train_end(self) -> None:
        """Keep what the better modality's network has learned, unless its validation Dice fell."""
        dice = self._better_trainer.logger.get_value("mean_fg_dice", step=None)
        at_rest, joined = dice[: self._joining_epoch], dice[self._joining_epoch :]
        may_give_back = self.fold != "all" if self.may_give_back is None else self.may_give_back
        if may_give_back and joined and at_rest and fmean(joined) < fmean(at_rest):
            self.print_to_log_file(
                f"{self.better_modality}: mean validation Dice {fmean(at_rest):.4f} at rest, {fmean(joined):.4f} since "
                f"it joined; its network is that of {self.first_stage.__name__} again."
            )
            deployed = self._better_trainer.deployed_network()
            deployed.load_state_dict(self.better_weights)
        super().on_train_end()

    @property
    def _joining_epoch(self) -> int:
        return ceil((1 - self.join_fraction) * self.num_epochs)

    # the method

    def draws(self) -> list[tuple[str, ...]]:
        """Those that show the better modality, from which the others learn."""
        return [draw for draw in super().draws() if not self.better_modality or self.better_modality in draw]

    def learners(self) -> list[ModalityTrainer]:
        """The weaker modalities, and for the end of the stage all."""
        if self.current_epoch >= self._joining_epoch:
            return self.trainers
        return [t for t in self.trainers if t.name != self.better_modality]

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], Tensor]:
        """Compare with the pseudo-labels (B, heads, *patch) of the better modality's patches."""
        return [unlabeled.images], self.soft_pseudo_labels(unlabeled.images[self.better_modality])

    def unsupervised_terms(self, outputs: Sequence[View], targets: Tensor) -> dict[str, Tensor]:
        """Area-similarity contrast, cross-entropy and Dice of every learner with the pseudo-labels."""
        labels, foreground = self.in_batch(targets), self.foreground(targets)
        (logits,) = outputs
        terms = {}
        for name, z in logits.items():
            self.count_pseudo_labels(name, labels)
            prediction = self.foreground(self.probabilities(z))
            terms[f"{name} asc"] = self.area_contrast([foreground, prediction])
            pair = self.ce_and_dice(self.in_batch(z), self.in_batch(prediction), labels)
            terms[f"{name} ce"], terms[f"{name} dice"] = pair
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
        return self.mean_prediction(self.labeler, image, self.teacher_passes)

    # checkpoints

    def get_method_state(self) -> dict[str, Any]:
        """The labeler, whose it is, the validation Dice that decided so, and the better network as it was given."""
        return {
            **super().get_method_state(),
            "better_modality": self.better_modality,
            "validation_dice": self.validation_dice,
            "labeler_weights": self.labeler.network.state_dict(),
            "better_weights": self.better_weights,
        }

    def set_method_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_method_state` returned."""
        super().set_method_state(state)
        self.validation_dice = state["validation_dice"]
        self.better_weights = state["better_weights"]
        self._set_labeler(state["better_modality"], state["labeler_weights"])


def _fold_folder(trainer: type[nnUNetTrainer], plans: dict[str, Any], configuration: str, fold: int | str) -> Path:
    results = environment_folder("nnUNet_results")
    model = model_folder(results, plans["dataset_name"], trainer.__name__, plans["plans_name"], configuration)
    return fold_folder(model, fold)


def _first_stage_checkpoint(
    trainer: type[nnUNetTrainer], plans: dict[str, Any], configuration: str, fold: int | str
) -> Path:
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
