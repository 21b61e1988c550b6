"""Hides the Python warnings of other packages that nobody who runs the tools can do anything about.

The tools call this before they import anything that warns. Data-loading processes inherit it.
"""
import warnings

# Beginnings of messages, as regular expressions.
MESSAGES = (
    'pkg_resources is deprecated',
    'Deprecated call to `pkg_resources',
    'TypedStorage is deprecated',
    r'torch\.meshgrid: in an upcoming release',
    # mmengine; the summary of the start says how many threads there are.
    r'Setting (OMP|MKL)_NUM_THREADS environment variable for each process',
    # DDP: a depthwise convolution's gradient lies in another order than its weight.
    'Grad strides do not match bucket view strides',
    # mmdet: an optional metric, and a tensor copied in the mask head.
    'faster_coco_eval is not installed',
    'To copy construct from a tensor',
    # mmengine's visualizer, of boxes that end where the picture does.
    r'Warning: The \w+ is out of bounds',
    # mmseg 1.2 calls a function of its own that it gives up.
    r'``build_\w+`` would be deprecated soon',
    # mmseg: the losses and the drawing hook say that they are as their configs have them.
    'Default ``avg_non_ignore`` is False',
    'The draw is False, it means that the hook for visualization',
)
PACKAGES = '(mmengine|mmcv|mmdet|mmseg|mmpretrain)'


def hide() -> None:
    """Installs the filters."""
    for message in MESSAGES:
        warnings.filterwarnings('ignore', message=message)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings('ignore', category=category, module=rf'{PACKAGES}(\.|$)')
