from .hooks import CheckpointKeysHook, ClassNamesHook, DrawPredictionsHook
from .label_range import LabelRangeHook
from .safe_files import safe_loading
from .start_summary import StartSummaryHook

__all__ = ['CheckpointKeysHook', 'ClassNamesHook', 'DrawPredictionsHook', 'LabelRangeHook', 'StartSummaryHook',
           'safe_loading']
