"""Found through nnUNet_extTrainer by the command-line tests: trainers whose epochs take a second."""

from nnunetv2_semicml.trainers.nnUNetTrainerSECLAnatomical import nnUNetTrainerSECLAnatomical
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL


class ShortMixin:
    num_epochs = 2
    num_iterations_per_epoch = 3
    num_val_iterations_per_epoch = 1
    save_every = 1

    def on_epoch_end(self):
        if self.current_epoch < self.num_epochs - 1:  # progress.png takes seconds: the last one will do
            for trainer in (self, *self.trainers):
                trainer.logger.plot_progress_png = lambda folder: None
        else:
            for trainer in (self, *self.trainers):
                vars(trainer.logger).pop("plot_progress_png", None)
        super().on_epoch_end()


class nnUNetTrainerSemiCML_test(ShortMixin, nnUNetTrainerSemiCML):
    pass


class nnUNetTrainerSemiCMLPReL_test(ShortMixin, nnUNetTrainerSemiCMLPReL):
    first_stage = nnUNetTrainerSemiCML_test


class nnUNetTrainerSECLAnatomical_test(ShortMixin, nnUNetTrainerSECLAnatomical):
    pass
