"""Semi-CML Plus: Semi-CML with two parts exchanged.

Sources: Zhang et al., Med. Image Anal. 83:102656, 2023 (contrast); Chen et al., CVPR 2021 (hard pseudo-labels);
Tarvainen and Valpola, NeurIPS 2017 (teachers). What the exchanges gain: benchmarks/study/validation.md.
"""

from collections.abc import Sequence

from torch import Tensor

from nnunetv2_semicml.training.area_contrast import WithAreaContrast
from nnunetv2_semicml.training.conductor import View
from nnunetv2_semicml.training.cross_pseudo_supervision import WithCrossPseudoSupervision
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerSemiCMLPlus(WithAreaContrast, WithCrossPseudoSupervision):
    """The contrast of Semi-CML beside hard pseudo-labels in the place of the mean squared error, and EMA teachers.

    Attributes:
        asc_weight: of the contrast; as in Semi-CML.
        teacher_averaging: the best-model average hardly follows a network whose validation Dice has little left to
            gain. On validation patients it was worse than its network, and the weaker modality gained less
            (benchmarks/study/validation.md).
    """

    teacher_averaging = "ema"
    term_weights = {"ce": "pseudo_label_weight", "dice": "pseudo_label_weight", "asc": "asc_weight"}
    asc_weight = 0.35

    def unsupervised_terms(self, outputs: Sequence[View], targets: None) -> dict[str, Tensor]:
        """Cross-entropy and Dice with the segmentations of the other modalities, and the area-similarity contrast."""
        (logits,) = outputs
        predictions = [self.foreground(self.probabilities(z)) for z in logits.values()]
        in_batch = {name: self.in_batch(z) for name, z in logits.items()}
        return {**self.cross_pseudo_supervision(in_batch), "asc": self.area_contrast(predictions)}
