"""Configs as they are written: what is read of them without running them, and what is compared."""
import pytest
from mmengine.config import Config
from mmengine.config import config as config_module
from yapf.yapflib import yapf_api

from convneur_mm import config
from convneur_mm.engine.runner.written_config import lay_out_once, model_differences, started_from, written_settings


def as_lists(value):
    if isinstance(value, dict):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.needs('mmdet')  # a base of the first is mmdet's
@pytest.mark.parametrize('name', ['cascade_rcnn_convneur_m1_shapes', 'semantic_fpn_convneur_m1_shapes'])
def test_shipped_configs_are_read_as_if_they_were_run(name):
    cfg = Config.fromfile(config(name))
    found = written_settings(cfg.pretty_text)
    assert found['model'] == as_lists(cfg.to_dict()['model'])
    assert found['optim_wrapper'] == as_lists(cfg.to_dict()['optim_wrapper'])


def test_equal_settings_are_laid_out_once(monkeypatch):
    """And as before; other ones for themselves."""
    place = config_module if hasattr(config_module, 'FormatCode') else yapf_api
    cfg = Config(dict(a=[*range(99)], b='x'))
    laid_out, original = [], lay_out_once.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(place, 'FormatCode', lambda text, **options: laid_out.append(text) or (text, options))
        original()
        assert place.FormatCode('x', style_config=dict(a=1)) == ('x', dict(style_config=dict(a=1)))
        assert place.FormatCode('x', style_config=dict(a=2)) == ('x', dict(style_config=dict(a=2)))
        texts = [cfg.pretty_text, cfg.pretty_text]
        cfg.b = 'y'
        texts.append(cfg.pretty_text)
        assert texts[0] == texts[1] != texts[2]
        assert laid_out == ['x', 'x', texts[0], texts[2]]


def test_nothing_is_run(tmp_path):
    path = tmp_path / 'made'
    text = f"a = open({str(path)!r}, 'w')\nb = dict(c=-1.5, d=float('inf'))\nprint(a)\n"
    assert written_settings(text) == {'a': f"open({str(path)!r}, 'w')", 'b': {'c': -1.5, 'd': "float('inf')"}}
    assert not path.exists()


def test_keys_that_are_no_identifiers():
    assert written_settings("a = dict({'neck.': dict(x=(1, 2)), 3: None})") == {'a': {'neck.': {'x': [1, 2]}, 3: None}}


def test_what_is_no_python_has_no_settings():
    assert written_settings('{"model": {}, ') == {}
    assert written_settings('model: 1\n') == {}


def differences(there, here):
    return list(model_differences(there, here))


def test_differences_are_named_with_both_values():
    there = dict(backbone=dict(memory_cfg=dict(chunk_size=196, inner_step=1.0), arch='m3'),
                 heads=[dict(a=1), dict(a=1)])
    assert differences(there, there) == []
    here = dict(backbone=dict(memory_cfg=dict(chunk_size=4096), arch='m3'), heads=[dict(a=1), dict(a=2)])
    assert differences(there, here) == [
        'model.backbone.memory_cfg.chunk_size is 196 there and 4096 here',
        'model.backbone.memory_cfg.inner_step is 1.0 there and None here', 'model.heads[1].a is 1 there and 2 here']
    assert differences(dict(a=[1]), dict(a=[1, 2])) == ['model.a is [1] there and [1, 2] here']


def test_where_weights_start_and_how_they_are_tested_does_not_count():
    there = dict(a=dict(init_cfg=dict(checkpoint='x'), norm_cfg=dict(type='SyncBN')), test_cfg=dict(rcnn=1))
    assert differences(there, dict(a=dict(norm_cfg=dict(type='BN')))) == []
    assert differences(dict(type='BN'), dict(type='GN')) == ["model.type is 'BN' there and 'GN' here"]


def test_files_that_a_training_started_from():
    settings = dict(load_from='b.pth', model=dict(
        backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='a.pth')), neck=[dict(checkpoint='c.pth')],
        head=dict(init_cfg=dict(checkpoint='a.pth'))), default_hooks=dict(checkpoint=dict(type='CheckpointHook')))
    assert started_from(settings) == ['b.pth', 'a.pth', 'c.pth']
    assert started_from(dict(load_from=None, pretrained=dict(m1='x.pth'))) == []
