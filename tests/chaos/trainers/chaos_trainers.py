"""Found through nnUNet_extTrainer by chaos.py: every kind of trainer, with three epochs of a second."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunetv2_semicml.trainers.nnUNetTrainerFilterMatch import nnUNetTrainerFilterMatch
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.trainers.nnUNetTrainerSECLRegion import nnUNetTrainerSECLRegion
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPlus import nnUNetTrainerSemiCMLPlus
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL
from nnunetv2_semicml.trainers.nnUNetTrainerSupervisedEMA import nnUNetTrainerSupervisedEMA
from nnunetv2_semicml.trainers.nnUNetTrainerUniMatch import nnUNetTrainerUniMatch


class Short:
    num_epochs = 3
    num_iterations_per_epoch = 2
    num_val_iterations_per_epoch = 1
    save_every = 1

    def on_epoch_end(self):
        for trainer in (self, *self.trainers):  # progress.png takes seconds: the last one will do
            if self.current_epoch < self.num_epochs - 1:
                trainer.logger.plot_progress_png = lambda folder: None
            else:
                vars(trainer.logger).pop("plot_progress_png", None)
        super().on_epoch_end()


class nnUNetTrainerSemiCML_chaos(Short, nnUNetTrainerSemiCML):
    bma_start_epoch = 0
    bma_pool_size = 2


class nnUNetTrainerSemiCMLPReL_chaos(Short, nnUNetTrainerSemiCMLPReL):
    first_stage = nnUNetTrainerSemiCML_chaos


class nnUNetTrainerMeanTeacher_chaos(Short, nnUNetTrainerMeanTeacher):
    pass


class nnUNetTrainerCPS_chaos(Short, nnUNetTrainerCPS):
    pass


class nnUNetTrainerSECLRegion_chaos(Short, nnUNetTrainerSECLRegion):
    pass


class nnUNetTrainerSupervisedEMA_chaos(Short, nnUNetTrainerSupervisedEMA):
    pass


class nnUNetTrainerFilterMatch_chaos(Short, nnUNetTrainerFilterMatch):
    """Leaves out cases after its first and its second epoch."""

    warmup_fraction = 0.0
    filtered_share = 0.5


class nnUNetTrainerUniMatch_chaos(Short, nnUNetTrainerUniMatch):
    pass


class nnUNetTrainerSemiCMLPlus_chaos(Short, nnUNetTrainerSemiCMLPlus):
    warmup_fraction = 1 / 3


class OnCPU:
    """nnU-Net takes a CUDA device for every one of several processes."""

    device = property(lambda self: torch.device("cpu"), lambda self, value: None)


class nnUNetTrainerOnCPU(OnCPU, nnUNetTrainer):
    pass


class nnUNetTrainerSemiCML_chaos2(OnCPU, nnUNetTrainerSemiCML_chaos):
    """For two_processes.py."""

    network_trainer = nnUNetTrainerOnCPU
    unlabeled_batch_size = 4
