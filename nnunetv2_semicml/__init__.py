"""Semi-supervised, multi-modal segmentation with nnU-Net: trainers, planning and data for unlabeled cases."""
