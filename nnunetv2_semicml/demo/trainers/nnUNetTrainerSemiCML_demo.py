"""Semi-CML on a schedule of minutes."""

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML


class nnUNetTrainerSemiCML_demo(nnUNetTrainerSemiCML):
    """Both networks of the demo, coupled on the unlabeled cases."""

    num_epochs = 4
    num_iterations_per_epoch = 30
    num_val_iterations_per_epoch = 2
    unlabeled_batch_size = 4
    oversample_foreground_percent = 0.67  # few steps: more of them show a lesion than nnU-Net's third
