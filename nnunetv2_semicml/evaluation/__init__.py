"""Compares methods on the test scans of every modality: metrics, statistics, leaderboard.

Knows nothing of trainers: it runs nnU-Net's command lines and reads the folders that they write.
"""

NOTATION = "[NAME=][each:|all:][FIRST+]TRAINER[@DATASET]"  # of a method to compare
