"""Loops, optimizers and signal handling for the Runner of the tools."""
