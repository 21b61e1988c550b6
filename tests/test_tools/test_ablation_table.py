"""tools/analysis/ablation_table.py: Table 5 within rounding, what it leaves out, accuracies from logs."""
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs('mmpretrain')


@pytest.fixture(scope='module')
def tool(script):
    return script('ablation_table')


@pytest.fixture(scope='module')
def rows(tool, tmp_path_factory):
    return tool.measure(tmp_path_factory.mktemp('empty'))


def test_every_variant_has_a_row(rows):
    assert {row['config'].split('_300e')[0] for row in rows if '(default)' not in row['variant']} == {
        f'ablation/convneur_m3_{name}' for name in (
            'placement_none', 'placement_block', 'branch_cbam', 'branch_non_local', 'branch_self_attention',
            'branch_rwkv', 'branch_titans', 'fusion_add', 'fusion_concat', 'mem_channels_64', 'mem_channels_256')}
    assert [(row['config'], row['paper_top1']) for row in rows if '(default)' in row['variant']] == 4 * [
        ('convneur_m3_300e_in1k', 80.0)]


def test_every_row_is_within_rounding_of_the_paper(rows):
    for row in rows:
        counted = row['gflops'] - row['attention_products_gflops']
        assert row['difference_gflops'] == pytest.approx(counted - row['paper_gflops']), row['variant']
        assert abs(row['difference_gflops']) < 0.05, row['variant']
        assert round(counted, 1) == row['paper_gflops'], row['variant']
    # The paper's count lacks q kᵀ and the product with v of self-attention, and of nothing else.
    tokens = [56**2, 28**2, 14**2, 7**2]
    assert [(row['variant'], row['attention_products_gflops']) for row in rows if row['attention_products_gflops']] == [
        ('self-attention', sum(2 * n * n * 128 for n in tokens) / 1e9)]


def write_log(folder: Path, *lines: str) -> None:
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text(''.join(f'{line}\n' for line in lines))


def test_command(tool, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    tool.main([])
    printed = capsys.readouterr().out
    assert 'top-1: no validated run of these configs in work_dirs/' in printed
    attention, = (line for line in printed.splitlines() if 'self-attention' in line and line.startswith('|'))
    assert [cell.strip() for cell in attention.split('|')[2:-1]] == [
        'self-attention', '9.64', '1.80 (4.49)', '1.8', '+0.005', '-', '79.8']

    runs = tmp_path / 'runs' / 'convneur_m3_branch_rwkv_300e_in1k'  # the best epoch of all runs counts
    write_log(runs / '20260101_000000' / 'vis_data', '{"lr": 0.1, "loss": 2.5, "step": 1}',
              '{"accuracy/top1": 11.5, "step": 6}', '{"accuracy/top1": 12.34, "step": 7}',
              '{"accuracy/top1": 12.0, "step": 8}')
    write_log(runs / '20260102_000000' / 'vis_data', '{"accuracy/top1": 9.0, "step": 9}')
    tool.main(['--work-dirs', 'runs', '--json', 'table.json'])
    printed = capsys.readouterr().out
    line, = (line for line in printed.splitlines() if '| ' in line and 'IR-RWKV' in line)
    assert '12.3 (epoch 7)' in line and 'no validated run' not in printed
    found = json.loads((tmp_path / 'table.json').read_text())['rows']
    assert len(found) == 15
    assert [(row['variant'], row['top1'], row['top1_epoch']) for row in found if row['top1'] is not None] == [
        ('IR-RWKV', 12.34, 7)]
    assert {'params_m', 'gflops', 'paper_gflops', 'paper_top1', 'difference_gflops'} <= found[0].keys()

    with refused("--work-dirs must be a folder, got 'walks'"):
        tool.main(['--work-dirs', 'walks'])
    write_log(tmp_path / 'runs' / 'convneur_m3_fusion_add_300e_in1k' / 'now' / 'vis_data', 'no')
    with refused("line 1: expected a JSON object with a step, got 'no'"):
        tool.main(['--work-dirs', 'runs'])
