"""Read checkpoints and other files without running code, and write files whole."""
