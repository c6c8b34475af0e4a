"""Mean Teacher: predictions agree with those of an averaged network.

Source: Tarvainen & Valpola, Mean teachers are better role models, NeurIPS 2017.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn.functional import mse_loss

from nnunetv2_semicml.training.conductor import LabeledPatches, UnlabeledDraw, View
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerMeanTeacher(nnUNetTrainerSemiSupervised):
    """Mean squared difference between a network's probabilities and those of its teacher, which is deployed.

    Attributes:
        consistency_weight: of the term. None is published for segmentation; that of Semi-CML's mean squared error.
        teacher_averaging: published.
        deploy_average: the teacher is the better network, which is why the method has its name.
    """

    teacher_averaging = "ema"
    deploy_average = True
    term_weights = {"mse": "consistency_weight"}
    consistency_weight = 1.0

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], dict[str, Tensor]]:
        """Compare with the probabilities (B, heads, *patch) of every network's teacher."""
        images = unlabeled.images
        return [images], {name: self.mean_prediction(self.teachers[name], image) for name, image in images.items()}

    def unsupervised_terms(self, outputs: Sequence[View], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sum over the networks, which learn independently of each other."""
        (logits,) = outputs
        return {"mse": self.over_networks(mse_loss(self.probabilities(z), targets[name]) for name, z in logits.items())}
