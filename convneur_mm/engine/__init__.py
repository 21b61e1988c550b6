from .checkpoint import safe_loading
from .hooks import CheckpointKeysHook, ClassNamesHook, DrawPredictionsHook
from .start_summary import StartSummaryHook

__all__ = ['CheckpointKeysHook', 'ClassNamesHook', 'DrawPredictionsHook', 'StartSummaryHook', 'safe_loading']
