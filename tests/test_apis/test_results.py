"""Files of predictions, read back by what others read them with, and pictures of them."""
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData

from convneur_mm.apis.results import Classifications, Detections, LabelMaps, Painter, open_results
from convneur_mm.engine.files.errors import LaunchError
from convneur_mm.stack import require

pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')
CLASSES, PALETTE = ('disk', 'star', 'ring'), [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def model(scope: str, **meta: object) -> SimpleNamespace:
    """What results need of a model."""
    return SimpleNamespace(cfg=SimpleNamespace(default_scope=scope),
                           dataset_meta=dict(classes=CLASSES, palette=PALETTE, **meta))


def detected(**fields: object):
    """Two objects in a picture of 30 x 40: a star that fills a square, and a disk of a lower score."""
    masks = torch.zeros(2, 30, 40, dtype=torch.bool)
    masks[0, 10:20, 5:15] = masks[1, 20:25, 30:34] = True
    found = InstanceData(bboxes=torch.tensor([[5.0, 10.0, 15.0, 20.0], [30.0, 20.0, 34.0, 25.0]]),
                         scores=torch.tensor([0.9, 0.2]), labels=torch.tensor([1, 0]), masks=masks)
    for name, value in fields.items():
        found[name] = value
    return require('mmdet.structures').DetDataSample(metainfo=dict(ori_shape=(30, 40)), pred_instances=found)


def segmented(labels: torch.Tensor):
    return require('mmseg.structures').SegDataSample(pred_sem_seg=PixelData(data=labels[None]))


def classified(*scores: float):
    return require('mmpretrain.structures').DataSample().set_pred_score(torch.tensor(scores)).set_pred_label(
        int(np.argmax(scores)))


class TestDetections:
    def read(self, folder: Path, *samples) -> dict:
        with open_results(model('mmdet'), folder) as results:
            for i, sample in enumerate(samples):
                results.add(f'{i}', f'{i}.jpg', sample)
        assert results.path == folder / 'detections.json'
        return json.loads(results.path.read_text())

    def test_coco_reads_them(self, tmp_path):
        from pycocotools.coco import COCO
        self.read(tmp_path, detected(), detected())
        coco = COCO(tmp_path / 'detections.json')
        assert [category['name'] for category in coco.loadCats([1, 2, 3])] == list(CLASSES)
        assert coco.loadImgs([2]) == [dict(id=2, file_name='1.jpg', width=40, height=30)]
        first, second = coco.loadAnns(coco.getAnnIds(imgIds=[2]))
        assert (first['category_id'], first['bbox'], first['area'], first['score']) == (2, [5, 10, 10, 10], 100, 0.9)
        assert (second['category_id'], second['bbox'], second['area']) == (1, [30, 20, 4, 5], 20)
        assert np.array_equal(coco.annToMask(first), detected().pred_instances.masks[0])
        assert len(coco.loadRes(coco.dataset['annotations']).anns) == 4

    def test_boxes_without_masks(self, tmp_path):
        sample = detected()
        del sample.pred_instances.masks
        entries = self.read(tmp_path, sample)['annotations']
        assert [entry['area'] for entry in entries] == [100, 20]
        assert not any('segmentation' in entry for entry in entries)

    def test_pictures_without_objects_are_listed(self, tmp_path):
        sample = detected()
        sample.pred_instances = sample.pred_instances[:0]
        content = self.read(tmp_path, sample)
        assert content['annotations'] == []
        assert [image['file_name'] for image in content['images']] == ['0.jpg']
        assert self.read(tmp_path)['images'] == []

    def test_the_file_is_whole_after_an_interruption(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), Detections(model('mmdet'), tmp_path) as results:
            results.add('a', 'a.jpg', detected())
            raise KeyboardInterrupt
        content = json.loads(results.path.read_text())
        assert (len(content['images']), len(content['annotations'])) == (1, 2)


class TestLabelMaps:
    @pytest.mark.parametrize('reduced', [False, True])
    def test_numbers_are_those_of_the_annotation_files(self, reduced, tmp_path):
        labels = torch.tensor([[0, 1, 2], [2, 2, 0]])
        with open_results(model('mmseg', reduce_zero_label=reduced), tmp_path) as results:
            results.add('sub/a', 'sub/a.jpg', segmented(labels))
        picture = cv2.imread(str(tmp_path / 'labels/sub/a.png'), cv2.IMREAD_UNCHANGED)
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, labels + reduced)
        classes = json.loads((tmp_path / 'classes.json').read_text())
        assert classes[str(1 + reduced)] == dict(name='star', color=[0, 255, 0])
        assert list(classes) == [str(i + reduced) for i in range(3)]

    def test_many_classes_need_two_bytes(self, tmp_path):
        many = model('mmseg')
        many.dataset_meta.update(classes=tuple(map(str, range(300))), palette=PALETTE * 100)
        LabelMaps(many, tmp_path).add('a', 'a.jpg', segmented(torch.tensor([[299, 3]])))
        picture = cv2.imread(str(tmp_path / 'labels/a.png'), cv2.IMREAD_UNCHANGED)
        assert picture.tolist() == [[299, 3]]


class TestClassifications:
    def test_best_first(self, tmp_path):
        many = model('mmpretrain')
        many.dataset_meta['classes'] = tuple('abcdefg')
        with open_results(many, tmp_path) as results:
            results.add('0', '0.jpg', classified(0.05, 0.3, 0.1, 0.25, 0.2, 0.01, 0.09))
            results.add('1', 'sub/1.jpg', classified(*[0.0] * 6, 1.0))
        first, second = map(json.loads, (tmp_path / 'classifications.jsonl').read_text().splitlines())
        assert (first['file'], second['file']) == ('0.jpg', 'sub/1.jpg')
        assert [(entry['label'], entry['name'], entry['score']) for entry in first['top']] == [
            (1, 'b', 0.3), (3, 'd', 0.25), (4, 'e', 0.2), (2, 'c', 0.1), (6, 'g', 0.09)]
        assert second['top'][0]['name'] == 'g'

    def test_of_three_classes_three(self, tmp_path):
        with Classifications(model('mmpretrain'), tmp_path) as results:
            results.add('0', '0.jpg', classified(0.1, 0.7, 0.2))
        assert [entry['label'] for entry in json.loads(results.path.read_text())['top']] == [1, 2, 0]


def test_predictions_of_another_kind_are_refused(tmp_path):
    sample = segmented(torch.zeros(2, 2))
    with open_results(model('mmdet'), tmp_path) as results, pytest.raises(
            LaunchError, match='its predictions are called pred_sem_seg, expected pred_instances'):
        results.add('a', 'a.jpg', sample)


def test_without_class_names_the_place_for_them_is_named(tmp_path):
    for scope, key in (('mmpretrain', 'classes'), ('mmseg', 'metainfo.classes')):
        nameless = model(scope)
        del nameless.dataset_meta['classes']
        with pytest.raises(LaunchError, match=rf'test_dataloader\.dataset\.{key}="\[a,b\]"'):
            open_results(nameless, tmp_path)


class TestPainter:
    """On a picture of one colour, whose channels tell BGR from RGB."""

    @pytest.fixture
    def picture(self):
        return np.full((300, 400, 3), (200, 100, 50), np.uint8)

    def test_detections_from_the_threshold_on(self, picture):
        big = detected(masks=torch.zeros(2, 300, 400, dtype=torch.bool),
                       bboxes=torch.tensor([[50.0, 100.0, 150.0, 200.0], [200.0, 100.0, 300.0, 200.0]]))
        strong, weak = np.s_[90:210, 40:160], np.s_[90:210, 190:310]
        for threshold, expected in ((0.1, (True, True)), (0.5, (True, False)), (0.95, (False, False))):
            drawn = Painter(model('mmdet'), threshold)(picture, big)
            assert drawn.shape == picture.shape
            assert tuple((drawn[part] != picture[part]).any() for part in (strong, weak)) == expected

    def test_segmentations_in_the_colours_of_their_classes(self, picture):
        labels = torch.zeros(300, 400, dtype=torch.long)
        labels[:, 200:] = 2
        drawn = Painter(model('mmseg'))(picture, segmented(labels)).astype(int)
        # Away from the names. BGR: the first class is red, the third blue.
        disk, ring = np.median(drawn[:, :200], (0, 1)), np.median(drawn[:, 200:], (0, 1))
        assert disk[2] > 200 > disk[0]
        assert ring[0] > 200 > ring[2]
        assert disk[0] < 100 > ring[2]

    @pytest.mark.parametrize('shape', [(300, 400), (64, 128)])
    def test_classifications_in_the_colours_of_the_picture(self, shape, picture):
        drawn = Painter(model('mmpretrain'))(np.ascontiguousarray(picture[:shape[0], :shape[1]]),
                                             classified(0.1, 0.7, 0.2))
        assert min(drawn.shape[:2]) >= 224  # legible
        assert drawn.shape[1] / drawn.shape[0] == pytest.approx(shape[1] / shape[0], rel=0.01)
        assert drawn.dtype == np.uint8
        np.testing.assert_allclose(drawn[-20:].mean((0, 1)), (200, 100, 50), atol=3)
        assert (drawn[:40] != (200, 100, 50)).any()
