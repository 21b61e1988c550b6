"""Metrics that configs import by name, each module with what it needs: :mod:`.boundary` (mmseg) and :mod:`.boundary_ap`
(mmdet)."""
