"""UniMatch of one modality: two strong views and perturbed features.

Source: Yang et al., Revisiting weak-to-strong consistency in semi-supervised semantic segmentation, CVPR 2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import dropout2d, dropout3d

from nnunetv2_semicml.training.conductor import LabeledPatches, UnlabeledDraw, View
from nnunetv2_semicml.training.modality_trainer import ModalityTrainer
from nnunetv2_semicml.training.schedules import with_schedules
from nnunetv2_semicml.training.strong_views import SureLabels, WithStrongViews


@with_schedules
class nnUNetTrainerUniMatch(WithStrongViews):
    """Every network learns from its own sure segmentation on strong views, and on the weak one with features dropped.

    Attributes:
        strong_views: how many strong views there are; published.
        strong_weight: weight of the mean loss of strong views. Published: (L_x + ¼ L_s1 + ¼ L_s2 + ½ L_fp) / 2 with
            L_x = (CE + Dice) / 2; nnU-Net's loss is twice that L_x.
        feature_weight: weight of the loss of the weak view with dropped features; published, likewise.
        feature_dropout: probability with which a channel of the encoder's features is dropped, at every resolution;
            published.
    """

    strong_views = 2
    term_weights = {"strong": "strong_weight", "features": "feature_weight"}
    strong_weight = 1.0
    feature_weight = 1.0
    feature_dropout = 0.5

    def initialize(self) -> None:
        """Build the networks, if they have features to drop."""
        super().initialize()
        network = self.trainers[0].unwrapped_network()
        if not (hasattr(network, "encoder") and hasattr(network, "decoder")):
            raise NotImplementedError(
                f"{type(self).__name__} drops features between an encoder and a decoder: {type(network).__name__} has "
                "none. Train nnUNetTrainerFixMatch, or plan a U-Net."
            )

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], Sequence[Mapping[str, SureLabels]]]:
        """Strong views and, last, the patches as they were drawn."""
        labels = self.sure_labels(unlabeled)
        strong = [self.strong_view(unlabeled, labels) for _ in range(self.strong_views)]
        return [*(view for view, _ in strong), unlabeled.images], [*(targets for _, targets in strong), labels]

    def unlabeled_output(self, trainer: ModalityTrainer, images: Tensor, view: int) -> Tensor:
        """Logits; those of the last view are made of features of which channels are dropped."""
        if view < self.strong_views:
            return super().unlabeled_output(trainer, images, view)
        network: Any = trainer.unwrapped_network()
        drop = dropout3d if images.ndim == 5 else dropout2d
        logits: Tensor = network.decoder([drop(skip, self.feature_dropout) for skip in network.encoder(images)])
        return logits

    def unsupervised_terms(
        self, outputs: Sequence[View], targets: Sequence[Mapping[str, SureLabels]]
    ) -> dict[str, Tensor]:
        """Dice losses: the mean of the two strong views, and that of the weak one with features dropped."""
        n = self.strong_views
        return {
            "strong": self.dice_where_sure(outputs[:n], targets[:n]),
            "features": self.dice_where_sure(outputs[n:], targets[n:]),
        }
