from .checkpoint import safe_loading
from .hooks import CheckpointKeysHook, ClassNamesHook, DrawPredictionsHook

__all__ = ['CheckpointKeysHook', 'ClassNamesHook', 'DrawPredictionsHook', 'safe_loading']
