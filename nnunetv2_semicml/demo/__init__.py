"""The demo: the whole journey on synthetic patients, and its page."""
