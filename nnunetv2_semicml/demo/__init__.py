"""The synthetic two-modality phantom and the demo that runs on it."""
