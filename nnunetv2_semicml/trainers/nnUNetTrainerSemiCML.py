"""Semi-CML: contrastive mutual learning of single-modality nnU-Nets.

Source: Zhang et al., Multi-modal contrastive mutual learning and pseudo-label re-learning for semi-supervised medical
image segmentation, Med. Image Anal. 83:102656, 2023.
"""

from collections.abc import Sequence

from torch import Tensor

from nnunetv2_semicml.losses.consistency import prediction_consistency
from nnunetv2_semicml.training.area_contrast import WithAreaContrast
from nnunetv2_semicml.training.conductor import View
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerSemiCML(WithAreaContrast):
    """Two or more modalities teach each other on unlabeled cases by the ASC loss and prediction consistency.

    Both terms are ramped, since predictions that are still wrong teach nothing. Published: the ramp of the MSE alone,
    exp(-5 (1 - t/T)^2), whose T is here a share of the training, so that every schedule reaches the full weights.

    Attributes:
        mse_weight: of the mean squared difference; published.
        asc_weight: of the contrast. Published: 3.5 beside 10 BCE + 7 Dice; nnU-Net's supervised loss, cross-entropy +
            Dice, is a tenth of that.
        teacher_averaging: of the teachers, one of which PReL goes on from; published. "ema" was the better teacher on
            validation patients (benchmarks/study/validation.md at commit cb2e976).
    """

    teacher_averaging = "bma"
    term_weights = {"mse": "mse_weight", "asc": "asc_weight"}
    mse_weight = 1.0
    asc_weight = 0.35

    def unsupervised_terms(self, outputs: Sequence[View], targets: None) -> dict[str, Tensor]:
        """Mean squared difference between the modalities, and their area-similarity contrast."""
        (logits,) = outputs
        predictions = [self.foreground(self.probabilities(z)) for z in logits.values()]
        return {
            "mse": prediction_consistency([self.in_batch(p) for p in predictions]),
            "asc": self.area_contrast(predictions),
        }
