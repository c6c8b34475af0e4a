"""Converters of public datasets into the raw layout of the package, one script per family.

The folder lies at the top of the repository and is installed as nnunetv2_semicml.dataset_conversion.
"""
