"""Semi-CML on a schedule of minutes."""

import torch

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML


class nnUNetTrainerSemiCML_demo(nnUNetTrainerSemiCML):
    """Both networks of the demo, coupled on the unlabeled cases."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 8
        self.num_iterations_per_epoch = 30
        self.num_val_iterations_per_epoch = 5
        # few steps: more of them show a lesion than nnU-Net's third
        self.oversample_foreground_percent = 0.67
