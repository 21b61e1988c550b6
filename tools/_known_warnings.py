"""Hide other packages' Python warnings that users of the tools cannot act on.

The tools call this before they import anything that warns. Data-loading processes inherit the filters.
"""
import warnings

# Regular expressions that match the start of a message.
MESSAGES = (
    'pkg_resources is deprecated',
    'Deprecated call to `pkg_resources',
    'TypedStorage is deprecated',
    r'torch\.meshgrid: in an upcoming release',
    # From mmengine. The summary at the start already gives the number of threads.
    r'Setting (OMP|MKL)_NUM_THREADS environment variable for each process',
    # From DDP: a depthwise convolution's gradient has another memory layout than its weight.
    'Grad strides do not match bucket view strides',
    # From mmdet: a missing optional metric, and a tensor copied in the mask head.
    'faster_coco_eval is not installed',
    'To copy construct from a tensor',
    # From mmengine's visualizer, for boxes that touch the image border.
    r'Warning: The \w+ is out of bounds',
    # mmseg 1.2 calls its own deprecated function.
    r'``build_\w+`` would be deprecated soon',
    # From mmseg: the losses and the drawing hook report settings that their configs chose.
    'Default ``avg_non_ignore`` is False',
    'The draw is False, it means that the hook for visualization',
)
PACKAGES = '(mmengine|mmcv|mmdet|mmseg|mmpretrain)'


def hide() -> None:
    """Install the filters."""
    for message in MESSAGES:
        warnings.filterwarnings('ignore', message=message)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings('ignore', category=category, module=rf'{PACKAGES}(\.|$)')
