"""Insight into the global branches: the parts of the gated blocks, and the chunks of their memories, for a picture."""
from .gate import BlockParts, GateRecorder, context_of, gated_blocks, local_only_features
from .trace import ChunkTrace, trace

__all__ = ['BlockParts', 'ChunkTrace', 'GateRecorder', 'context_of', 'gated_blocks', 'local_only_features', 'trace']
