"""PReL on a schedule of minutes, after nnUNetTrainerSemiCML_demo."""

from nnUNetTrainerSemiCML_demo import nnUNetTrainerSemiCML_demo  # nnU-Net finds the modules here as top-level ones

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL


class nnUNetTrainerSemiCMLPReL_demo(nnUNetTrainerSemiCMLPReL):
    """Both networks of the demo, taught by the better one's teacher."""

    first_stage = nnUNetTrainerSemiCML_demo
    num_epochs = 3
    num_iterations_per_epoch = 20
    num_val_iterations_per_epoch = 2
    unlabeled_batch_size = 4
    oversample_foreground_percent = 0.67
