"""The trainers, one per file, and the base they share."""
