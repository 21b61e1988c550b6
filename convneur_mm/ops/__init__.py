"""Operators used by the models."""
