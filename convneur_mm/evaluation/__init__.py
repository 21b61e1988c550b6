"""Metrics for configs to import by module name: :mod:`.boundary` (needs mmseg), :mod:`.boundary_ap` (needs mmdet)."""
