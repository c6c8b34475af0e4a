"""The trainers that nnUNetv2_train -tr may name: one method per file, the class named like the file.

A file that is put here is found; nothing else has to name it. docs/extending.md tells how one is written.
"""
