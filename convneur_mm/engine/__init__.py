"""Run the tools: files, checks, runner, hooks, launch; each imports only those before it.

Importing this package changes no other package. What the tools change in one, and which private names they use, is
listed here, with the public way that was looked for.

Replaced within :func:`.files.safe_files.safe_loading`, which restores it:

- ``torch.load``, in ``torch`` and ``torch.serialization``: OpenMMLab's packages call it in many places without
  ``weights_only``, and PyTorch's allow-list cannot check the arguments of what it allows.
- ``torch.storage._load_from_bytes``: it calls ``torch.load`` for tensors that processes exchange.
- ``CheckpointLoader.load_checkpoint``: a scheme can be registered, but not for local paths beside MMEngine's own.
- ``Config.fromstring``: MMEngine runs the config in a checkpoint, without a hook to refuse it.
- ``numpy.load``, ``file_handlers`` of MMEngine: its ``register_handler`` cannot be undone.

Replaced for the rest of the process:

- MMEngine's 'local' file backend, by its ``register_backend``; yapf's ``FormatCode``, which MMEngine calls five times
  with the same text and which no option leaves out.
- ``LoggerHook.after_test_epoch`` of the Runner in processes but the first, ``update_params`` of its optimizer wrapper
  with ``max_skips``, the pipelines of its data sets: what a config names may be of any class, so it cannot be a
  subclass.
- Handlers of SIGINT, SIGTERM and SIGCHLD while a tool runs; ``sys.excepthook`` in data workers.
- A filter of the console's log handler until the first batch.

Private names of other packages:

- MMEngine: ``Runner._resume``, ``_load_from`` and ``_test_loop``, in :mod:`.runner.model_wrappers` alone: its hooks
  learn neither whether it resumes, nor from what, nor whether it tests. ``_iterator`` of a data loader, to begin it
  anew with its workers. ``mmengine._strategy`` has the only FSDP strategy. ``CheckpointHook``'s ``_save_checkpoint``
  and its two neighbours, which a subclass extends to delete after saving.
- PyTorch: ``_metadata`` of a ``state_dict``, which it documents but does not name publicly; ``_world.pg_map`` and the
  backends of a group, to join gloo's threads before Python ends (pytorch/pytorch#190489); ``PyTorchFileReader`` and
  ``_rebuild_tensor``, and ``_untyped_storage``, to read a file as ``torch.load`` does. Models ask for a module's hooks
  and for dispatch modes, and export uses the ``scan`` operator.
- pickle: ``_Unpickler``, as the public one, in C, takes no table of opcodes.
- mmseg: ``_get_center_loc`` of its visualizer, overridden in :mod:`convneur_mm.visualization.segmentation`, as it takes
  a second a picture. mmdet and mmseg: ``_enable_normalize`` of a data preprocessor. timm: ``feature_take_indices``.
"""
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
