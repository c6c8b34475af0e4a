"""PReL on a schedule of minutes, after nnUNetTrainerSemiCML_demo."""

import torch
from nnUNetTrainerSemiCML_demo import nnUNetTrainerSemiCML_demo  # nnU-Net finds the modules here as top-level ones

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL


class nnUNetTrainerSemiCMLPReL_demo(nnUNetTrainerSemiCMLPReL):
    """Both networks of the demo, taught by the better one's teacher."""

    first_stage = nnUNetTrainerSemiCML_demo

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 5
        self.num_iterations_per_epoch = 30
        self.num_val_iterations_per_epoch = 5
        self.oversample_foreground_percent = 0.67
