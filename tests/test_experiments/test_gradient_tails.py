"""experiments/gradient_tails.py: the same samples for all settings, and statistics of known distributions."""
import numpy as np
import pytest
import torch


@pytest.fixture
def tool(script, monkeypatch):
    """The tool, its picture 64 x 64: 256 tokens, of which chunks of 196 leave a second, shorter one."""
    tool = script('gradient_tails')
    monkeypatch.setattr(tool, 'ARCH', dict(depths=[1], channels=[8], mem_channels=16))
    monkeypatch.setattr(tool, 'SHAPE', (64, 64))
    tool.sample.cache_clear()
    yield tool
    tool.sample.cache_clear()


def test_settings_differ_in_nothing_else(tool):
    """Weights are those of the seed; biases of the step and of the decay are the first and the last third."""
    models = {name: tool.build(setting, 'parallel,final', 3) for name, setting in tool.SETTINGS.items()}
    (backbone, head), (slow, _) = models['196/1'], models['decay bias 0']
    for other, other_head in models.values():
        assert torch.equal(head.weight, other_head.weight)
        differing = [name for name, value in backbone.state_dict().items() if not value.equal(other.state_dict()[name])]
        assert differing in ([], ['stages.0.0.global_branch.memory.generators.2.bias'])
    bias = slow.stages[0][0].global_branch.memory.generators[2].bias.detach()
    assert bias.tolist() == [-2.0] * 16 + [0.0] * 32
    memory = backbone.stages[0][0].global_branch.memory
    assert (memory.update_rule, memory.retrieve) == ('parallel', 'final')
    assert not torch.equal(head.weight, tool.build(tool.SETTINGS['196/1'], 'parallel,final', 4)[1].weight)


def test_norms_of_a_sample(tool):
    norms = tool.Norms()
    setting, rule = tool.Setting(dict(chunk_size=100, inner_step=1.0)), 'sequential,previous'
    for seed in range(2):
        tool.add_norms(norms, setting, rule, seed, (64, 64))
    assert len(norms.memory) == 2 and len(norms.chunks) == 6
    image, labels = tool.sample(1, 64, 64)
    assert image.shape == (1, 3, 64, 64) and labels.shape == (1, 16, 16) and labels.max() > 0
    backbone, head = tool.build(setting, rule, 1)
    torch.nn.functional.cross_entropy(head(backbone(image)[0]), labels).backward()
    grads = {name: p.grad for name, p in backbone.named_parameters()}
    prefix = 'stages.0.0.global_branch.memory.'
    memory = [name for name in grads if name.startswith(prefix)]

    def norm(names):
        return pytest.approx(torch.cat([grads[name].flatten() for name in names]).norm().item(), rel=1e-5)

    assert norms.memory[1] == norm(memory)
    assert norms.groups['M_0'][1] == norm([f'{prefix}w1', f'{prefix}w2'])
    assert norms.groups['query, proj'][1] == norm([f'{prefix}query.weight', f'{prefix}proj.weight'])
    assert norms.groups['rest of the backbone'][1] == norm(set(grads) - set(memory))
    # The last chunk is read and never written: its gradient is that of its reads, and not zero.
    assert min(norms.chunks) > 0


def test_statistics_of_known_distributions(tool):
    rng = np.random.default_rng(0)
    for index in (0.8, 2.5):
        assert tool.tail_index(rng.pareto(index, 40_000) + 1) == pytest.approx(index, rel=0.1)
    assert tool.tail_index([1.0] * 40) == np.inf
    assert tool.kurtosis(rng.normal(size=100_000)) == pytest.approx(3, rel=0.05)
    assert tool.kurtosis([-1.0, 1.0]) == 1


def test_table(tool, capsys):
    tool.main(['--settings', '196/1', 'num_chunks=4', '--rules', 'sequential,previous', 'parallel,final', '--samples',
               '2'])
    header, _, *lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert [row[:2] for row in rows] == [[name, rule] for name in ('196/1', 'num_chunks=4') for rule in (
        'sequential, previous', 'parallel, final')]
    assert len({tuple(row[2:10]) for row in rows}) == 4, 'each has gradients of its own'
    assert all(float(cell) > 0 for row in rows for cell in row[2:])
    assert len(header.strip('|').split('|')) == len(rows[0])
