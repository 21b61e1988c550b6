"""Run the tools: files, checks, runner, hooks, launch; each imports only those before it."""
from .files.safe_files import safe_loading
from .hooks.checkpoints import CheckpointKeysHook, ClassNamesHook, SaveThenDeleteHook
from .hooks.drawing import DrawPredictionsHook
from .hooks.label_range import LabelRangeHook
from .hooks.memory_log import MemoryLogHook
from .hooks.non_finite import NonFiniteLossHook
from .hooks.sigterm import SaveAtSigtermHook
from .hooks.start_summary import StartSummaryHook
from .runner.loops import ResumableEpochBasedTrainLoop, ResumableIterBasedTrainLoop
from .runner.optim import BFloat16OptimWrapper, GroupingConstructor
from .settings import SettingsHook, SettingsRunner, apply_settings

__all__ = [
    'BFloat16OptimWrapper', 'CheckpointKeysHook', 'ClassNamesHook', 'DrawPredictionsHook', 'GroupingConstructor',
    'LabelRangeHook', 'MemoryLogHook', 'NonFiniteLossHook', 'ResumableEpochBasedTrainLoop',
    'ResumableIterBasedTrainLoop', 'SaveAtSigtermHook', 'SaveThenDeleteHook', 'SettingsHook', 'SettingsRunner',
    'StartSummaryHook', 'apply_settings', 'safe_loading',
]
