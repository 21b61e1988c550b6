"""Checkpoints and other files: what they hold, read without running code, and written whole."""
