"""Faults of upstream packages are mended, and of their forks nothing is changed."""
import pytest
import torch
import torch.nn.functional as F

from convneur_mm.engine.upstream import mend_class_weights


@pytest.mark.needs('mmseg')
def test_ignored_pixels_have_no_class_weight():
    from mmseg.models.losses import CrossEntropyLoss
    mend_class_weights()
    weights = [0.4, 1.0, 2.0]
    scores, labels = torch.randn(2, 3, 4, 5), torch.arange(40).reshape(2, 4, 5) % 3
    labels[0, 1:, :2] = 255
    found = CrossEntropyLoss(class_weight=weights)(scores, labels, ignore_index=255)
    torch.testing.assert_close(found, F.cross_entropy(scores, labels, torch.tensor(weights), ignore_index=255))
    # And what others did before.
    for options in dict(reduction='sum'), dict(avg_non_ignore=True):
        found = CrossEntropyLoss(**options)(scores, labels, ignore_index=255)
        torch.testing.assert_close(found, F.cross_entropy(
            scores, labels, ignore_index=255, reduction=options.get('reduction', 'mean')))
