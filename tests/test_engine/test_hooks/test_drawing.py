"""Pictures of predictions: who draws them, where, and under which names."""
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
from mmengine.structures import BaseDataElement

from convneur_mm.engine.hooks import drawing
from convneur_mm.engine.hooks.drawing import DrawPredictionsHook, _path_below_prefix


class TestPictures:
    """Drawn by a visualizer that keeps what it is asked for, and whether it takes this for the first process."""

    @pytest.fixture
    def draw(self, tmp_path, monkeypatch):
        def draw(method='add_datasample', size=(4, 6), rank=0, **settings):
            image = np.zeros((*size, 3), np.uint8)
            image[..., 2] = 255  # red
            mmcv.imwrite(image, str(tmp_path / 'val' / 'x.png'))
            kept = []
            monkeypatch.setattr(drawing.dist_utils, 'get_rank', lambda group=None: rank)
            visualizer = SimpleNamespace(**{method: lambda **kwargs: kept.append(
                dict(kwargs, main=drawing.dist_utils.is_main_process()))})
            dataset = SimpleNamespace(metainfo=dict(classes='ab'), data_prefix=dict(img=str(tmp_path)))
            runner = SimpleNamespace(visualizer=visualizer, test_loop=SimpleNamespace(
                dataloader=SimpleNamespace(dataset=dataset)))
            hook = DrawPredictionsHook(**settings)
            hook.before_test(runner)
            assert visualizer.dataset_meta == dict(classes='ab')
            sample = BaseDataElement(metainfo=dict(img_path=str(tmp_path / 'val' / 'x.png')))
            hook.after_test_iter(runner, 0, None, [sample, sample])
            assert [drawn['data_sample'] for drawn in kept] == [sample, sample]
            assert {drawn['name'] for drawn in kept} == {'val/x.png'}
            assert drawing.dist_utils.is_main_process() is (rank == 0)
            return kept[0]

        return draw

    def test_go_to_a_folder_from_every_process(self, draw):
        for rank in 0, 1:
            drawn = draw(rank=rank, out_dir='out', draw_args=dict(pred_score_thr=0.3))
            assert drawn['out_file'] == 'out/val/x.png' and drawn['main'] and drawn['pred_score_thr'] == 0.3
            assert drawn['show'] is False and drawn['wait_time'] == 2.0

    def test_go_to_a_window_and_the_backends_from_the_first_process(self, draw):
        for rank in 0, 1:
            drawn = draw(rank=rank, show=True, wait_time=0.5)
            assert drawn['out_file'] is None and drawn['main'] is drawn['show'] is (rank == 0)
            assert drawn['wait_time'] == 0.5

    @pytest.mark.parametrize('method, size, shape', [
        ('add_datasample', (4, 6), (4, 6, 3)), ('visualize_cls', (112, 168), (224, 336, 3)),
        ('visualize_cls', (336, 112), (672, 224, 3)), ('visualize_cls', (224, 300), (224, 300, 3)),
        ('visualize_cls', (223, 300), (224, 301, 3))])
    def test_of_classifications_are_large_enough_for_their_text(self, draw, method, size, shape):
        image = draw(method, size, out_dir='out')['image']
        assert image.shape == shape
        assert image[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize('path, prefixes, name', [
    ('data/val/1.jpg', dict(img='data/val/'), '1.jpg'),
    ('data/val/cat/1.jpg', dict(img_path='data/val'), 'cat/1.jpg'),
    ('data/images/1.jpg', dict(seg_map_path='data/annotations', img_path='data/images'), '1.jpg'),
    ('elsewhere/1.jpg', dict(img='data/val'), '1.jpg'),
    ('data/val/1.jpg', dict(img_path=''), '1.jpg'),
])
def test_pictures_are_named_by_their_place_below_the_data_prefix(path, prefixes, name):
    assert _path_below_prefix(path, SimpleNamespace(data_prefix=prefixes)) == name


def test_pictures_of_joined_data_sets_are_named_by_their_files():
    assert _path_below_prefix('data/val/1.jpg', SimpleNamespace(datasets=[])) == '1.jpg'
