"""Boundary AP of instance segmentation. It needs mmdet and faster-coco-eval, so configs import this module by name."""
from __future__ import annotations

import os.path as osp
from collections.abc import Sequence
from importlib import metadata
from tempfile import TemporaryDirectory

from mmengine.fileio import load
from mmengine.logging import MMLogger
from mmengine.utils import digit_version

from ..stack import StackError, require

require('mmdet')

from mmdet.datasets.api_wrappers import COCO  # noqa: E402
from mmdet.evaluation import CocoMetric  # noqa: E402
from mmdet.registry import METRICS  # noqa: E402

# Older versions fail if a detector finds nothing in the whole data set.
FASTER_COCO_EVAL = '1.8'
# In the order of COCOeval_faster's stats.
STATS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


@METRICS.register_module()
class BoundaryAP(CocoMetric):
    """COCO's mask AP with the smaller of mask IoU and boundary IoU instead of mask IoU (Cheng et al., 2021).

    faster-coco-eval computes it, on the masks that mmdet's ``CocoMetric`` would evaluate. The results are
    ``coco/boundary_mAP``, ``_50``, ``_75``, ``_s``, ``_m`` and ``_l``, from 0 to 1, or -1 if the truth has no such
    instance. As on COCO's server, the 100 masks of the highest scores count for each image and class.

    Args:
        ann_file (str | None): See ``CocoMetric``. Defaults to None, which uses the truth in the data samples.
        band_width (float): Distance that the boundary IoU's band extends into the mask, as a fraction of the image's
            diagonal, rounded to pixels, at least 1. Defaults to 0.02.
        backend_args (dict | None): See ``CocoMetric``. Defaults to None.
        collect_device (str): See ``CocoMetric``. Defaults to 'cpu'.
        prefix (str | None): See ``CocoMetric``. Defaults to None, for 'coco'.

    Raises:
        StackError: If faster-coco-eval is not installed, or too old; names the command that installs it.
        ValueError: If ``band_width`` is not such a fraction.
    """

    def __init__(self, ann_file: str | None = None, band_width: float = 0.02, backend_args: dict | None = None,
                 collect_device: str = 'cpu', prefix: str | None = None) -> None:
        # Checked here, not at import, as MMEngine drops the reason if an import of a config fails.
        try:
            found = metadata.version('faster-coco-eval')
        except metadata.PackageNotFoundError:
            found = None
        if found is None or digit_version(found) < digit_version(FASTER_COCO_EVAL):
            raise StackError(f'BoundaryAP needs faster-coco-eval {FASTER_COCO_EVAL} or later, got {found}. Mend with: '
                             f"pip install 'faster-coco-eval>={FASTER_COCO_EVAL}'")
        if not isinstance(band_width, float) or not 0 < band_width < 1:
            raise ValueError("band_width must be a share of the image's diagonal between 0.0 and 1.0, got "
                             f'{band_width!r}')
        super().__init__(ann_file, 'segm', backend_args=backend_args, collect_device=collect_device, prefix=prefix)
        self.band_width = band_width

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Encode a batch's masks, see ``CocoMetric``.

        Raises:
            ValueError: If the predictions have no masks, or if neither ``ann_file`` nor the data samples have true
                masks; names the image.
        """
        for sample in data_samples:
            if 'masks' not in sample['pred_instances']:
                raise ValueError(f'{sample.get("img_path")}: no masks predicted; BoundaryAP expected a detector with a '
                                 'mask head')
            if self._coco_api is None and not all(truth.get('mask') for truth in sample.get('instances', [{}])):
                raise ValueError(f'{sample.get("img_path")}: no masks to compare with; BoundaryAP expected an '
                                 'ann_file, or LoadAnnotations(with_mask=True) and instances among the meta keys')
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list[tuple[dict, dict]]) -> dict[str, float]:
        """Compute the six APs, rounded to three digits, and log them with the recalls.

        Args:
            results (list[tuple[dict, dict]]): Truth and masks of each image, as ``CocoMetric`` collects them.
        """
        from faster_coco_eval import COCO as FastCOCO
        from faster_coco_eval import COCOeval_faster

        truths, preds = zip(*results)
        with TemporaryDirectory() as folder:
            path = osp.join(folder, 'results')
            truth = self._coco_api or COCO(self.gt_to_coco_json(truths, path))
            self.cat_ids = truth.get_cat_ids(cat_names=self.dataset_meta['classes'])
            masks = load(self.results2json(preds, path)['segm'])
        for mask in masks:
            del mask['bbox']  # else its area would decide what is small, medium or large
        truth = FastCOCO(truth.dataset)
        logger = MMLogger.get_current_instance()
        evaluation = COCOeval_faster(truth, truth.loadRes(masks), 'boundary', print_function=logger.info,
                                     boundary_dilation_ratio=self.band_width)
        evaluation.params.catIds = self.cat_ids
        evaluation.run()
        return {f'boundary_{name}': round(float(evaluation.stats[i]), 3) for i, name in enumerate(STATS)}
