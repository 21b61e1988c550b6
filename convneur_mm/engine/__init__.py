from .hooks import CheckpointKeysHook, ClassNamesHook, DrawPredictionsHook
from .safe_files import safe_loading
from .start_summary import StartSummaryHook

__all__ = ['CheckpointKeysHook', 'ClassNamesHook', 'DrawPredictionsHook', 'StartSummaryHook', 'safe_loading']
