"""Semi-CML: contrastive mutual learning of single-modality nnU-Nets, and its schedules.

Source: Zhang et al., Multi-modal contrastive mutual learning and pseudo-label re-learning for semi-supervised medical
image segmentation, Med. Image Anal. 83:102656, 2023.
"""

import torch
from torch import Tensor

from nnunetv2_semicml.losses.asc import AreaSimilarityContrastiveLoss
from nnunetv2_semicml.losses.consistency import prediction_consistency
from nnunetv2_semicml.trainers.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.trainers.teacher import BestModelPool, Teacher


class nnUNetTrainerSemiCML(nnUNetTrainerSemiSupervised):
    """Two or more modalities teach each other on unlabeled cases by the ASC loss and prediction consistency."""

    min_modalities = 2
    compares_modalities = True
    min_unlabeled = 2

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        # Published: ASC weight 3.5 beside 10 BCE + 7 Dice. nnU-Net's supervised loss is 1 CE + 1 Dice, a tenth of that.
        self.asc_weight = 0.35
        self.asc_temperature = 1.0  # published; a sharper 0.2 with weight 1 destroyed both networks in development
        self.mse_weight = 1.0  # published
        # Published: the ramp of the MSE, exp(-5 (1 - t/T)^2). Both terms are ramped here, since predictions that are
        # still wrong teach nothing, and T is a share of the training so that every schedule reaches the full weights.
        self.rampup_fraction = 0.4

        # Published: the 6 best validation epochs from epoch 10 on, of 50 in this stage. A shorter schedule starts after
        # the same fifth of its epochs.
        self.bma_pool_size = 6
        self.bma_start_epoch = 10
        # "bma" (published), or "ema" for an exponential moving average over the steps, which on validation patients was
        # the better teacher (benchmarks/study/validation.md)
        self.teacher_averaging = "bma"
        self.ema_decay = 0.99
        self.teachers: dict[str, Teacher] = {}
        self.pools: dict[str, BestModelPool] = {}

    def initialize(self) -> None:
        """Build the networks and a teacher of each, from which PReL goes on."""
        if self.teacher_averaging not in ("bma", "ema"):
            raise ValueError(f'teacher_averaging must be "bma" or "ema", got {self.teacher_averaging!r}.')
        super().initialize()
        self.teachers = {t.name: Teacher(t.unwrapped_network(), self._do_i_compile()) for t in self.trainers}
        self.pools = {t.name: BestModelPool(self.bma_pool_size) for t in self.trainers}

    def unsupervised_terms(self, outputs: dict[str, Tensor], targets: None) -> dict[str, Tensor]:
        """Mean squared difference between the modalities, and their area-similarity contrast."""
        predictions = self.predictions(outputs)
        return {
            "mse": prediction_consistency([self.in_batch(p) for p in predictions]),
            "asc": self.area_contrast(predictions),
        }

    def predictions(self, outputs: dict[str, Tensor]) -> list[Tensor]:
        """Foreground probabilities (B, C, *patch) from the logits (B, heads, *patch) of every modality's network."""
        return [self.foreground(self.probabilities(logits)) for logits in outputs.values()]

    def area_contrast(self, predictions: list[Tensor]) -> Tensor:
        """The ASC loss of the contrasted cases."""
        asc_loss = AreaSimilarityContrastiveLoss(self.asc_temperature, distributed=self.is_ddp)
        return asc_loss([self.contrasted(p) for p in predictions])

    def unsupervised_weights(self) -> dict[str, float]:
        """Both weights, ramped over the first epochs."""
        ramp = self.ramp()
        return {"mse": ramp * self.mse_weight, "asc": ramp * self.asc_weight}

    def train_step(self, batch: dict) -> dict:
        """Make a step; the teachers follow if they average over steps."""
        losses = super().train_step(batch)
        if self.teacher_averaging == "ema":
            for trainer in self.trainers:
                self.teachers[trainer.name].follow(trainer.unwrapped_network(), self.ema_decay)
        return losses

    def on_validation_epoch_end(self, val_outputs: list[list[dict]]) -> None:
        """Log, and offer every network with its validation Dice to its pool of best models."""
        super().on_validation_epoch_end(val_outputs)
        started = self.current_epoch >= min(self.bma_start_epoch, self.num_epochs // 5)
        for trainer in self.trainers:
            dice = trainer.logger.get_value("mean_fg_dice", step=-1)
            keep = self.pools[trainer.name].update(dice) if started else 0.0
            if self.teacher_averaging == "bma":
                self.teachers[trainer.name].average(trainer.unwrapped_network(), keep)

    def get_method_state(self) -> dict:
        """Teachers and the validation Dice of their pools."""
        return {
            name: {
                "teacher_weights": teacher.network.state_dict(),
                "teacher_steps": teacher.steps,
                "best_dice": self.pools[name].values,
            }
            for name, teacher in self.teachers.items()
        }

    def set_method_state(self, state: dict) -> None:
        """Restore teachers and pools."""
        for name, of_modality in state.items():
            self.teachers[name].network.load_state_dict(of_modality["teacher_weights"])
            self.teachers[name].steps = of_modality["teacher_steps"]
            self.pools[name] = BestModelPool(self.bma_pool_size, of_modality["best_dice"])


class nnUNetTrainerSemiCML_5epochs(nnUNetTrainerSemiCML):
    """For trying things out."""

    epochs = 5


class nnUNetTrainerSemiCML_50epochs(nnUNetTrainerSemiCML):
    """A twentieth of nnU-Net's schedule."""

    epochs = 50


class nnUNetTrainerSemiCML_250epochs(nnUNetTrainerSemiCML):
    """A quarter of nnU-Net's schedule."""

    epochs = 250
