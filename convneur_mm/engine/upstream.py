"""What ends a training in the frozen upstream packages by a fault of theirs, mended as their forks have it."""
from __future__ import annotations

from mmengine.utils import digit_version
from torch import Tensor


def mend_class_weights() -> None:
    """Has mmseg 1.2's cross entropy with ``class_weight`` pass over ignored pixels, whose label is none of a class.

    The mean is that over all others, by their weights. To be called before the loss is built.
    """
    import mmseg
    from mmseg.models.losses import cross_entropy_loss as module
    if digit_version(mmseg.__version__) >= digit_version('1.3') or hasattr(module.cross_entropy, '__wrapped__'):
        return
    original = module.cross_entropy

    def cross_entropy(pred: Tensor, label: Tensor, weight: Tensor | None = None, class_weight: Tensor | None = None,
                      reduction: str = 'mean', avg_factor: int | None = None, ignore_index: int = -100,
                      avg_non_ignore: bool = False) -> Tensor:
        if class_weight is not None and avg_factor is None and reduction == 'mean':
            avg_factor = class_weight[label[label != ignore_index]].sum()
        return original(pred, label, weight, class_weight, reduction, avg_factor, ignore_index, avg_non_ignore)

    cross_entropy.__wrapped__ = original
    module.cross_entropy = cross_entropy
