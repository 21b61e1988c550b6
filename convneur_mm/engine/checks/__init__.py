"""What is checked of configs and data before a run."""
