#!/usr/bin/env python
r"""Draw the training images of a config with their labels, as the training pipeline passes them to the model.

    tools/analysis/browse_dataset.py configs/cascade_rcnn_convneur_m3_1x_coco.py --out browse
    tools/analysis/browse_dataset.py configs/semantic_fpn_convneur_m2_80k_ade20k.py --number 5 --seed 1

The pictures are PNGs named by position and source file; nothing is shown on a screen.
"""
import argparse
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, VISUALIZERS, DefaultScope
from mmengine.runner import set_random_seed

from convneur_mm.analysis.bench import Progress
from convneur_mm.engine.checks.file_checks import check_data_files
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.launch import add_config_arguments, config_of

# For configs that name no visualizer.
VISUALIZER_TYPES = dict(mmdet='DetLocalVisualizer', mmseg='SegLocalVisualizer', mmpretrain='UniversalVisualizer')
Sample = dict[str, object]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('--number', type=int, default=20, metavar='N',
                        help='draw the first N images; 0 draws all (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0,
                        help='seed of the random parts of the pipeline (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('browse'), metavar='DIR',
                        help='output folder of the pictures (default: %(default)s)')
    return parser.parse_args(argv)


def build_dataset(cfg: Config) -> BaseDataset:
    """Build the training data set, within the config's scope.

    Raises:
        ValueError: If the config has none, or a file of it is missing.
    """
    loader = cfg.get('train_dataloader')
    if not loader:
        raise ValueError('the config has no train_dataloader')
    check_data_files(cfg, ('train',))
    return DATASETS.build(loader.dataset)


def drawer(cfg: Config, dataset: BaseDataset) -> Callable[[str, Sample, Path], None]:
    """Return a function that draws a sample of the config's package into a file."""
    scope = cfg.default_scope
    settings = dict(cfg.get('visualizer') or dict(type=VISUALIZER_TYPES[scope]))
    settings['vis_backends'] = []  # write files, do not log
    visualizer = VISUALIZERS.build(dict(settings, name='browse_dataset'))
    visualizer.dataset_meta = dataset.metainfo

    def draw(name: str, sample: Sample, out: Path) -> None:
        image = sample['inputs'].permute(1, 2, 0).numpy()
        if not preprocessor_takes_rgb(cfg):
            image = image[..., ::-1]
        image, labels = np.ascontiguousarray(image), sample['data_samples']
        if scope == 'mmpretrain':
            visualizer.visualize_cls(image, labels, classes=dataset.metainfo.get('classes'), draw_pred=False, name=name,
                                     rescale_factor=max(1.0, 224 / min(image.shape[:2])), out_file=str(out))
        else:
            if scope == 'mmdet':
                labels = with_plain_boxes(labels)
            visualizer.add_datasample(name, image, labels, draw_pred=False, show=False, out_file=str(out))

    return draw


def preprocessor_takes_rgb(cfg: Config) -> bool:
    """Tell whether pipelines already yield RGB, so that the model's preprocessor keeps the channel order."""
    settings = {**(cfg.get('data_preprocessor') or {}), **(cfg.model.get('data_preprocessor') or {})}
    return not (settings.get('to_rgb') or settings.get('bgr_to_rgb'))


def with_plain_boxes(labels):
    """Convert mmdet's labels for its visualizer: boxes to a tensor, masks to an array."""
    from mmdet.structures.bbox import BaseBoxes
    from mmdet.structures.mask import BitmapMasks
    labels = labels.clone()
    instances = labels.gt_instances
    if isinstance(instances.get('bboxes'), BaseBoxes):
        instances.bboxes = instances.bboxes.tensor
    masks = instances.get('masks')
    if masks is not None:
        instances.masks = (masks if isinstance(masks, BitmapMasks) else masks.to_bitmap()).masks.astype(bool)
    return labels


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.number < 0:
        raise ValueError(f'--number must be at least 0, got {args.number}')
    cfg = config_of(args)
    if cfg.get('default_scope') not in VISUALIZER_TYPES:
        raise ValueError(f'{args.config}: default_scope must be one of {", ".join(VISUALIZER_TYPES)}, got '
                         f'{cfg.get("default_scope")!r}')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = build_dataset(cfg)
        if not len(dataset):
            raise ValueError('the training data set has no images (are all of them filtered out?)')
        draw = drawer(cfg, dataset)
        args.out.mkdir(parents=True, exist_ok=True)
        set_random_seed(args.seed)
        count = min(args.number or len(dataset), len(dataset))
        progress = Progress()
        for i in range(count):
            sample = dataset[i]
            source = sample['data_samples'].get('img_path') or f'image{i}'
            name = f'{i:0{len(str(count - 1))}d}_{Path(source).stem}'
            progress(f'{i + 1}/{count} {name}')
            draw(name, sample, args.out / f'{name}.png')
        progress.clear()
    print(f'{count} of {len(dataset)} images of the training data set in {args.out}/')


if __name__ == '__main__':
    with one_line_errors():
        main()
