from .hooks import CheckpointKeysHook

__all__ = ['CheckpointKeysHook']
