"""Metrics beside those of mmseg. They need mmseg: configs import this package by name."""
from .boundary import BoundaryMetric, boundary_counts, boundary_scores

__all__ = ['BoundaryMetric', 'boundary_counts', 'boundary_scores']
