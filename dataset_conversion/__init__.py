"""Converters of public datasets into the raw layout of the package, one script per family; run from a clone."""
