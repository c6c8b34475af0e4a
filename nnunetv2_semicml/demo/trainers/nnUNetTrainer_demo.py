"""Stock nnU-Net on a schedule of minutes: the demo's supervised-only reference."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainer_demo(nnUNetTrainer):
    """One network of one modality, trained on the labeled cases alone."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 6  # as many steps as both stages of the other demo trainers
        self.num_iterations_per_epoch = 30
        self.num_val_iterations_per_epoch = 2
        # few steps: more of them show a lesion than nnU-Net's third
        self.oversample_foreground_percent = 0.67
