from .hooks import CheckpointKeysHook, ClassNamesHook, DrawPredictionsHook, SaveThenDeleteHook
from .label_range import LabelRangeHook
from .loops import ResumableEpochBasedTrainLoop, ResumableIterBasedTrainLoop
from .memory_log import MemoryLogHook
from .non_finite import NonFiniteLossHook
from .optim import BFloat16OptimWrapper, GroupingConstructor
from .safe_files import safe_loading
from .settings import SettingsHook, SettingsRunner, apply_settings
from .sigterm import SaveAtSigtermHook
from .start_summary import StartSummaryHook

__all__ = [
    'BFloat16OptimWrapper', 'CheckpointKeysHook', 'ClassNamesHook', 'DrawPredictionsHook', 'GroupingConstructor',
    'LabelRangeHook', 'MemoryLogHook', 'NonFiniteLossHook', 'ResumableEpochBasedTrainLoop',
    'ResumableIterBasedTrainLoop', 'SaveAtSigtermHook', 'SaveThenDeleteHook', 'SettingsHook', 'SettingsRunner',
    'StartSummaryHook', 'apply_settings', 'safe_loading',
]
