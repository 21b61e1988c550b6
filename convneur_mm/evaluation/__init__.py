"""Metrics beside those of mmseg, which this package needs: configs import it by name."""
from ..stack import require

require('mmseg')

from .boundary import BoundaryCounts, BoundaryMetric, boundary_counts, boundary_scores  # noqa: E402

__all__ = ['BoundaryCounts', 'BoundaryMetric', 'boundary_counts', 'boundary_scores']
