from .hooks import CheckpointKeysHook, ClassNamesHook, DrawPredictionsHook
from .start_summary import StartSummaryHook

__all__ = ['CheckpointKeysHook', 'ClassNamesHook', 'DrawPredictionsHook', 'StartSummaryHook']
