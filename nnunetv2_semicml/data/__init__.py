"""Raw datasets, modality groups, paired cases and their streams, and a synthetic dataset to try them on.

Imports nnU-Net, nothing else of the package but errors.
"""
