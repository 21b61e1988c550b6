"""dev/zoo.py: the lists of models are up to date, complete, and read by those they are for."""
import shutil
from pathlib import Path

import pytest
import yaml
from mmengine.config.utils import _get_cfg_metainfo

from convneur_mm.paths import config_root

pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def tool(script):
    return script('zoo')


@pytest.fixture(scope='module')
def listed() -> dict[str, dict]:
    """What the metafile has of each config, by its name below configs/."""
    models = yaml.safe_load((ROOT / 'configs/metafile.yml').read_text())['Models']
    return {model['Config'].removeprefix('configs/').removesuffix('.py'): model for model in models}


@pytest.fixture
def recorded(tool, listed, monkeypatch):
    """Takes counts from the metafile instead of counting, which takes a minute for all."""
    def count(name):
        metadata = listed[name]['Metadata']
        return tool.Count(metadata['Parameters'], metadata['FLOPs'])

    monkeypatch.setattr(tool, 'count', count)


def test_every_recipe_and_ablation_is_listed_once(tool, listed):
    root = config_root()
    expected = {path.relative_to(root).with_suffix('').as_posix() for folder in (root, root / 'ablation')
                for path in folder.glob('*convneur*.py') if not path.stem.endswith('_shapes')}
    assert len(expected) == 27
    assert {model.config for model in tool.models()} == listed.keys() == expected
    assert len(tool.models()) == len(listed)


def test_files_are_up_to_date(tool, recorded, capsys):
    assert tool.main(['--check']) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('name', [
    'ablation/convneur_m3_branch_self_attention_300e_in1k', 'cascade_rcnn_convneur_m2_1x_coco'])
def test_counts_are_those_of_the_config(name, tool, listed):
    counted = tool.count(name)
    assert dict(Parameters=counted.parameters, FLOPs=counted.macs).items() <= listed[name]['Metadata'].items()


def test_counts_of_the_paper_are_within_its_rounding(tool, listed):
    for arch, row in tool.paper.IMAGENET.items():
        metadata = listed[f'convneur_{arch}_300e_in1k']['Metadata']
        assert round(metadata['Parameters'] / 1e6, 1) == row.params_m
        assert round(metadata['FLOPs'] / 1e9, 2) == row.gflops
    for name, gflops in (('semantic_fpn_convneur_m2', 106), ('semantic_fpn_convneur_m3', 123),
                         ('upernet_convneur_m4', 908)):
        assert round(listed[f'{name}_80k_ade20k']['Metadata']['FLOPs'] / 1e9) == gflops


def test_results_are_marked_as_the_papers(listed):
    metrics = {name: [result['Metrics'] for result in model['Results'] or ()] for name, model in listed.items()}
    assert metrics['convneur_m4_300e_in1k'] == [{'Top 1 Accuracy (paper)': 81.5}]
    assert metrics['cascade_rcnn_convneur_m3_1x_coco'] == [{'box AP (paper)': 42.4}, {'mask AP (paper)': 39.0}]
    assert metrics['upernet_convneur_m4_80k_ade20k'] == [{'mIoU (paper)': 45.72}]
    assert metrics['upernet_convneur_m1_80k_ade20k'] == []
    assert all(key.endswith(' (paper)') for found in metrics.values() for result in found for key in result)
    assert not any('Weights' in model for model in listed.values())


def test_those_that_read_it(listed, tmp_path):
    """The package that mim and mmpretrain read it with, and mmengine by the layout of a wheel."""
    from modelindex.load_model_index import load  # of mmpretrain's requirements
    index = load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert {model.config.removeprefix('configs/').removesuffix('.py') for model in index.models} == listed.keys()
    assert all((ROOT / model.config).is_file() for model in index.models)
    folder = tmp_path / '.mim'
    (folder / 'configs').mkdir(parents=True)
    shutil.copy(ROOT / 'model-index.yml', folder)
    shutil.copy(ROOT / 'configs/metafile.yml', folder / 'configs')
    found = _get_cfg_metainfo(str(tmp_path), 'convneur_m1_300e_in1k.py')
    assert found == listed['convneur_m1_300e_in1k']


@pytest.fixture
def checkout(tool, tmp_path, monkeypatch) -> Path:
    """A copy of the files that may be written to."""
    for name in (tool.INDEX, tool.METAFILE, tool.DOCS, tool.README):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    return tmp_path


def test_what_is_out_of_date_is_shown_and_mended(tool, recorded, checkout, capsys):
    before = {path: path.read_text() for path in checkout.rglob('*') if path.is_file()}
    (checkout / tool.METAFILE).write_text(before[checkout / tool.METAFILE].replace('81.5', '99.9'))
    docs = checkout / tool.DOCS
    readme = checkout / tool.README
    for page in (docs, readme):
        page.write_text(page.read_text().replace('| 81.5 |', '| 99.9 |'))
    (checkout / tool.INDEX).unlink()
    assert tool.main(['--check']) == 1
    out = capsys.readouterr().out
    for line in ('-      Top 1 Accuracy (paper): 99.9', '+      Top 1 Accuracy (paper): 81.5',
                 '+- configs/metafile.yml'):
        assert line in out.splitlines()
    for name in (tool.DOCS, tool.README):
        assert '| 99.9 |' in out.partition(f'--- {name}\n')[2].partition('--- ')[0]
    assert not (checkout / tool.INDEX).exists()
    assert tool.main([]) == 0
    assert {path: path.read_text() for path in checkout.rglob('*') if path.is_file()} == before


def test_results_of_our_own_stand_beside_the_papers(tool, recorded, checkout, monkeypatch):
    monkeypatch.setitem(tool.REPRODUCED, 'convneur_m1_300e_in1k', (75.1, ))
    tool.main([])
    models = yaml.safe_load((checkout / tool.METAFILE).read_text())['Models']
    assert [result['Metrics'] for result in models[0]['Results']] == [
        {'Top 1 Accuracy (paper)': 75.4}, {'Top 1 Accuracy': 75.1}]
    line, = (line for line in (checkout / tool.DOCS).read_text().splitlines() if '`convneur_m1_300e_in1k`' in line)
    assert line.endswith('| 75.4 | 75.1 | not yet |')


def test_table_of_the_readme(tool, recorded, checkout, monkeypatch):
    def rows():
        text = (checkout / tool.README).read_text().partition(tool.START)[2].partition(tool.END)[0]
        return [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.strip().splitlines()]

    tool.main([])
    head, _, *found = rows()
    assert head[2] == 'FLOPs (G, 224 × 224)'
    assert found == [['m1', '4.3', '0.71', '75.4', '', ''],
                     ['m2', '6.1', '1.01', '77.6', '41.2 / 36.4', '39.17 (Semantic FPN)'],
                     ['m3', '10.6', '1.77', '80.0', '42.4 / 39.0', '41.42 (Semantic FPN)'],
                     ['m4', '18.1', '3.06', '81.5', '', '45.72 (UperNet)']]
    # What is not the paper's has no place there.
    monkeypatch.setitem(tool.REPRODUCED, 'convneur_m1_300e_in1k', (75.1, ))
    tool.main([])
    assert rows()[2:] == found


@pytest.mark.parametrize('page', ['DOCS', 'README'])
def test_pages_without_a_place_for_the_tables(page, tool, recorded, checkout):
    page = checkout / getattr(tool, page)
    page.write_text(page.read_text().replace(tool.END, ''))
    with pytest.raises(ValueError, match=f'^{page} must have the lines .* once each'):
        tool.main([])
    page.unlink()
    with pytest.raises(ValueError, match=f'^{page} is not there; this tool is for a checkout'):
        tool.main([])
