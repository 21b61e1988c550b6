from .hooks import CheckpointKeysHook, ClassNamesHook, DrawPredictionsHook

__all__ = ['CheckpointKeysHook', 'ClassNamesHook', 'DrawPredictionsHook']
