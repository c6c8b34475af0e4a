"""Compares methods on the test scans of every modality: metrics, statistics, leaderboard.

Knows nothing of trainers: it runs nnU-Net's command lines and reads the folders that they write.
"""

NOTATION = "[NAME=][each:|all:][FIRST+]TRAINER[@DATASET]"  # of a method to compare
# what a case is ranked by, in the mean of its percentile ranks: name -> the measures of `measure`
SCORES = {
    "mean": ("entropy", "fold_disagreement", "disagreement"),
    "entropy": ("entropy",),
    "folds": ("fold_disagreement",),
    "modalities": ("disagreement",),
}
