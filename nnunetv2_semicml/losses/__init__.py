"""Losses: pure functions and modules of tensors. Nothing here imports nnU-Net."""

from nnunetv2_semicml.losses.asc import AreaSimilarityContrastiveLoss
from nnunetv2_semicml.losses.consistency import masked_consistency, prediction_consistency
from nnunetv2_semicml.losses.contrastive import ContrastiveLoss, pool_features
from nnunetv2_semicml.losses.soft_pseudo_label import confidence, soft_cross_entropy, soft_dice_loss

__all__ = [
    "AreaSimilarityContrastiveLoss",
    "ContrastiveLoss",
    "confidence",
    "masked_consistency",
    "pool_features",
    "prediction_consistency",
    "soft_cross_entropy",
    "soft_dice_loss",
]
