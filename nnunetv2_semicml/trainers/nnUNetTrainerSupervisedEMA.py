"""The fair supervised reference for methods that deploy an averaged network."""

from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerSupervisedEMA(nnUNetTrainerSemiSupervised):
    """nnU-Net's training on labeled cases alone; the exponential moving average of the network is deployed.

    Attributes:
        deploy_average: what the method is for.
    """

    min_unlabeled = 0
    deploy_average = True

    def draws(self) -> list[tuple[str, ...]]:
        """None."""
        return []
