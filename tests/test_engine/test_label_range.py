"""Labels of the first batch that the model does not tell apart, in trainings of the three tasks."""
import re
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import TRANSFORMS

from convneur_mm.engine.label_range import Allowed


@TRANSFORMS.register_module()
class LabelOfNothing:
    def __call__(self, results):
        results['gt_bboxes_labels'][:] = 9
        return results


class TestSegmentation:
    @pytest.fixture
    def train(self, tiny_config, shapes, run, tmp_path):
        """Trains for one iteration on label maps with further values; returns the line of the error, or None."""

        def train(model, change, **settings):
            cfg = tiny_config(model)
            folder = tmp_path / 'labels'
            folder.mkdir(exist_ok=True)
            for path in (shapes / 'mmseg/annotations/training').iterdir():
                labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
                change(labels)
                cv2.imwrite(str(folder / path.name), labels)
            cfg.train_dataloader.dataset.data_prefix.seg_map_path = str(folder)
            cfg.merge_from_dict(settings)
            cfg.dump('config.py')
            return run('train')

        return train

    def test_sound_maps_pass(self, train):
        assert train('semantic_fpn', lambda labels: None) is None

    def test_a_value_that_no_class_has(self, train):
        def change(labels):
            labels[0, :5] = 11

        assert re.match(
            r'\S*/labels/\d+\.png has label 11 after the pipeline: model\.decode_head takes 0 to 6 \(num_classes=7\) '
            r'and 255 \(ignore_index\); mend the label maps, or set num_classes .*; if 11 is no class, set '
            r'ignore_index=11 in the data sets, in all heads and in the evaluators$', train('semantic_fpn', change))
        # With the head told, it passes.
        assert train('semantic_fpn', change, **{'model.decode_head.ignore_index': 11}) is None

    def test_in_one_of_two_heads_alone(self, train):
        """The place that is easily forgotten."""
        def change(labels):
            labels[0, :5] = 11

        message = train('upernet', change, **{'model.decode_head.ignore_index': 11})
        assert 'has label 11 after the pipeline: model.auxiliary_head takes 0 to 6' in message

    def test_several_values(self, train):
        def change(labels):
            labels[0, :3] = range(200, 203)

        assert 'has labels 200, 201, 202 after the pipeline' in train('semantic_fpn', change)

    def test_classes_counted_from_one(self, train):
        def change(labels):
            labels += 1

        assert train('semantic_fpn', change).endswith(
            '; if the maps count the classes from 1, set reduce_zero_label=True in the data sets')
        loading = {f'train_dataloader.dataset.{key}reduce_zero_label': True for key in ('', 'pipeline.1.')}
        assert train('semantic_fpn', change, **loading) is None


def test_objects_of_a_detector(tiny_config, run):
    """A data set with a pipeline of its own; those of COCO files are compared before."""
    cfg = tiny_config('cascade_rcnn')
    cfg.train_dataloader.dataset.pipeline.insert(-1, dict(type='LabelOfNothing'))
    cfg.dump('config.py')
    assert re.match(r'\S*/mmdet/train/\d+\.jpg has objects with label 9: model\.roi_head\.bbox_head\[0\] takes '
                    r'0 to 5 \(num_classes=6\); mend the annotations, or set num_classes of all heads', run('train'))


@pytest.mark.parametrize('collate', [default_collate, pseudo_collate])
def test_images_of_a_classifier(tiny_config, shapes, run, collate):
    """Listed in a file, which is not read beforehand."""
    cfg = tiny_config('')
    cfg.train_dataloader.collate_fn = dict(type=collate.__name__)
    lines = [f'{path.relative_to(shapes / "mmpretrain/train")} 6'
             for path in (shapes / 'mmpretrain/train').glob('*/*.jpg')]
    Path('train.txt').write_text('\n'.join(lines))
    cfg.train_dataloader.dataset.ann_file = str(Path('train.txt').absolute())
    cfg.dump('config.py')
    assert re.match(r'\S*/mmpretrain/train/\S+\.jpg has label 6: model\.head takes 0 to 5 \(num_classes=6\); mend',
                    run('train'))
    Path('train.txt').write_text('\n'.join(line[:-1] + '5' for line in lines))
    assert run('train') is None


def test_what_is_allowed():
    labels = torch.tensor([0, 6, 7, 255, -1])
    assert Allowed('head', 7, 255).wrong(labels) == [-1, 7]
    assert Allowed('head', 7).wrong(labels) == [-1, 7, 255]
    assert Allowed('head', 8, -1).wrong(labels) == [255]
    assert Allowed('head', 7, 255).wrong(torch.zeros(0, dtype=torch.long)) == []
