"""tools/analysis/ablation_table.py: Table 5 within rounding, what explains the rest, accuracies from logs."""
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from convneur_mm import config
from convneur_mm.models import ConvNeur

FOLDER = Path(__file__).parents[2] / 'tools' / 'analysis'


@pytest.fixture(scope='module')
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'path', [str(FOLDER), *sys.path])
        import ablation_table
        yield ablation_table


@pytest.fixture(scope='module')
def rows(tool, tmp_path_factory):
    return tool.measure(tmp_path_factory.mktemp('empty'))


def by_config(rows: list[dict], name: str) -> dict:
    return next(row for row in rows if name in row['config'])


def test_every_row_of_the_paper(rows):
    """Variants and figures as Table 5 has them, the default once in each group."""
    assert [(row['experiment'], row['paper_gflops'], row['paper_top1']) for row in rows] == [
        ('global memory', 1.4, 78.2), ('global memory', 1.8, 80.0), ('global memory', 2.3, 80.4),
        ('branch', 1.5, 78.4), ('branch', 3.0, 79.1), ('branch', 1.8, 79.8), ('branch', 2.0, 77.6),
        ('branch', 3.1, 79.6), ('branch', 1.8, 80.0),
        ('fusion', 1.8, 79.6), ('fusion', 1.9, 79.5), ('fusion', 1.8, 80.0),
        ('memory channels', 1.5, 78.6), ('memory channels', 1.8, 80.0), ('memory channels', 2.7, 80.3)]
    assert {row['config'].split('_300e')[0] for row in rows if '(default)' not in row['variant']} == {
        f'ablation/convneur_m3_{name}' for name in (
            'placement_none', 'placement_block', 'branch_cbam', 'branch_non_local', 'branch_self_attention',
            'branch_rwkv', 'branch_titans', 'fusion_add', 'fusion_concat', 'mem_channels_64', 'mem_channels_256')}
    assert [row['config'] for row in rows if '(default)' in row['variant']] == 4 * ['convneur_m3_300e_in1k']


def test_every_row_is_within_rounding_of_the_paper(rows):
    for row in rows:
        counted = row['gflops'] - row['attention_products_gflops']
        assert row['difference_gflops'] == pytest.approx(counted - row['paper_gflops']), row['variant']
        assert abs(row['difference_gflops']) < 0.05, row['variant']
        assert round(counted, 1) == row['paper_gflops'], row['variant']


def test_concatenation_adds_parameters(rows):
    added = by_config(rows, 'fusion_concat')['params_m'] - by_config(rows, 'fusion_add')['params_m']
    assert round(added, 1) == 0.7
    assert by_config(rows, 'fusion_add')['params_m'] == by_config(rows, 'convneur_m3_300e')['params_m']


def test_only_self_attention_needs_an_explanation(tool, rows, monkeypatch):
    """The paper's count lacks q kᵀ and the product with v; its counts of non-local and Titans do not."""
    row = by_config(rows, 'self_attention')
    tokens = [56**2, 28**2, 14**2, 7**2]
    assert row['attention_products_gflops'] == sum(2 * n * n * 128 for n in tokens) / 1e9
    assert row['gflops'] - row['paper_gflops'] > 2.6
    assert all(not other['attention_products_gflops'] for other in rows if other is not row)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, **_: torch.zeros_like(v))
    without = {}
    for name in ('self_attention', 'non_local', 'titans'):
        path = f'ablation/convneur_m3_branch_{name}_300e_in1k'
        without[name] = tool.count_flops(tool.build(path), torch.empty(tool.IMAGE, device='meta')) / 1e9
    assert without['self_attention'] == pytest.approx(row['gflops'] - row['attention_products_gflops'], abs=1e-12)
    for name in ('non_local', 'titans'):
        assert by_config(rows, name)['paper_gflops'] - without[name] > 0.8


def test_report(tool, rows):
    text = tool.report(rows)
    lines = text.splitlines()
    assert len([line for line in lines if line.startswith('| ')]) == 2 + len(rows)
    attention, = (line for line in lines if 'self-attention' in line and line.startswith('|'))
    assert [cell.strip() for cell in attention.split('|')[2:-1]] == [
        'self-attention', '9.64', '1.80 (4.49)', '1.8', '+0.005', '-', '79.8']
    assert 'paper FLOPs (G)' in lines[0] and 'paper top-1' in lines[0]
    assert "They are\n  2.69 G; with them it is 4.49 G." in text
    assert "the paper's own figures, no runs of ours" in text


@pytest.mark.needs('mmpretrain')
@pytest.mark.parametrize('name', ['convneur_m3_300e_in1k', 'ablation/convneur_m3_branch_titans_300e_in1k'])
def test_counted_is_the_configs_classifier(tool, name):
    cfg = Config.fromfile(config(name))
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        classifier = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))
    found = tool.build(name)
    assert [p.shape for p in found.parameters()] == [p.shape for p in classifier.parameters()]


def write_log(folder: Path, *lines: str) -> None:
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text(''.join(f'{line}\n' for line in lines))


def test_best_accuracy_of_all_runs_in_a_work_dir(tool, tmp_path):
    work_dir = tmp_path / 'convneur_m3_fusion_add_300e_in1k'
    assert tool.best_top1(work_dir) is None
    write_log(work_dir / '20260101_000000' / 'vis_data', '{"lr": 0.1, "loss": 2.5, "step": 1}',
              '{"accuracy/top1": 71.5, "accuracy/top5": 99.0, "step": 1}',
              '{"accuracy/top1": 78.25, "accuracy/top5": 90.0, "step": 2}',
              '{"accuracy/top1": 77.0, "accuracy/top5": 91.0, "step": 3}')
    assert tool.best_top1(work_dir) == (78.25, 2)
    write_log(work_dir / '20260102_000000' / 'vis_data', '{"accuracy/top1": 79.0, "step": 4}')
    assert tool.best_top1(work_dir) == (79.0, 4)
    write_log(work_dir / '20260103_000000' / 'vis_data', '{"loss": 2.0, "step": 1}', '{"loss": 2.')
    with pytest.raises(ValueError, match=r'20260103_000000.*scalars.json, line 2: expected JSON, got .*"loss": 2\.'):
        tool.best_top1(work_dir)


def test_command(tool, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    counts = {row['config']: row for row in rows}
    monkeypatch.setattr(tool, 'build', lambda name: counts[name])  # which were counted once already
    monkeypatch.setattr(tool, 'count_parameters', lambda row: row['params_m'] * 1e6)
    monkeypatch.setattr(tool, 'count_flops', lambda row, _: row['gflops'] * 1e9)
    monkeypatch.setattr(tool, 'attention_products', lambda row, _: row['attention_products_gflops'] * 1e9)
    tool.main([])
    assert 'top-1: no validated run of these configs in work_dirs/' in capsys.readouterr().out

    write_log(tmp_path / 'runs' / 'convneur_m3_branch_rwkv_300e_in1k' / 'now' / 'vis_data',
              '{"accuracy/top1": 12.34, "step": 7}')
    tool.main(['--work-dirs', 'runs', '--json', 'table.json'])
    printed = capsys.readouterr().out
    line, = (line for line in printed.splitlines() if '| ' in line and 'IR-RWKV' in line)
    assert '12.3 (epoch 7)' in line and 'no validated run' not in printed
    found = json.loads((tmp_path / 'table.json').read_text())['rows']
    assert len(found) == 15
    assert [(row['variant'], row['top1'], row['top1_epoch']) for row in found if row['top1'] is not None] == [
        ('IR-RWKV', 12.34, 7)]
    assert {'params_m', 'gflops', 'paper_gflops', 'paper_top1', 'difference_gflops'} <= found[0].keys()

    with pytest.raises(SystemExit, match="--work-dirs must be a folder, got 'walks'"):
        tool.main(['--work-dirs', 'walks'])
    write_log(tmp_path / 'runs' / 'convneur_m3_fusion_add_300e_in1k' / 'now' / 'vis_data', 'no')
    with pytest.raises(SystemExit, match="line 1: expected JSON, got 'no'"):
        tool.main(['--work-dirs', 'runs'])


def test_attention_products_are_those_of_a_pass(tool):
    model = ConvNeur(dict(depths=[1, 1], channels=[8, 8], mem_channels=16), global_branch='self_attention',
                     out_indices=1)
    assert tool.attention_products(model, torch.zeros(1, 3, 32, 64)) == 2 * 16 * ((8 * 16)**2 + (4 * 8)**2)
    assert all(not module._forward_pre_hooks for module in model.modules())
