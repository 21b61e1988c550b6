"""The memory as torch.export sees it: equal to the reference, in operators of PyTorch alone, at every size."""
import pytest
import torch

from convneur_mm.models import ConvNeur, NeuralMemory


def written_memory(**options) -> NeuralMemory:
    """A layer in float64 whose writes change much of what is read."""
    memory = NeuralMemory(32, backend='reference', **options).double()
    with torch.no_grad():
        for name, weight in memory.named_parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3 if 'norm' not in name else 0.1)
    return memory.eval()


def run(program: torch.export.ExportedProgram, x: torch.Tensor):
    with torch.no_grad():
        return program.module()(x)


def export(module: torch.nn.Module, x: torch.Tensor, **options) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, (x,), strict=False, **options)


@pytest.mark.parametrize('retrieve, update_rule', [
    ('previous', 'sequential'), ('final', 'parallel'),
    pytest.param('previous', 'parallel', marks=pytest.mark.slow),
    pytest.param('final', 'sequential', marks=pytest.mark.slow)])
def test_equals_the_reference(retrieve, update_rule):
    """Export one chunk, and chunks with a ragged last one, which 'final' writes."""
    for num_tokens in (3, 10):
        memory = written_memory(chunk_size=7, retrieve=retrieve, update_rule=update_rule,
                                step_normalization=0.25 if update_rule == 'parallel' else 0.0)
        x = torch.randn(2, num_tokens, 32, dtype=torch.float64)
        expected = memory(x)
        found = run(export(memory, x), x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        if num_tokens > 7 or retrieve == 'final':
            memory.inner_step = 0.0
            assert (memory(x) - expected).abs().max() > 1e-3  # the writes matter


def test_chunks_by_their_number():
    memory, x = written_memory(num_chunks=4, step_normalization=0.25), torch.randn(2, 18, 32, dtype=torch.float64)
    torch.testing.assert_close(run(export(memory, x), x), memory(x), rtol=0, atol=1e-12)


def test_one_program_for_sizes_and_batches():
    """But for a batch as large as another dimension, which PyTorch's tracing keeps out."""
    memory, x = written_memory(chunk_size=7), torch.randn(3, 31, 32, dtype=torch.float64)
    auto = torch.export.Dim.AUTO
    program = export(memory, x, dynamic_shapes={'x': {0: auto, 1: auto}},
                     prefer_deferred_runtime_asserts_over_guards=True)
    for shape in ((4, 31), (3, 17), (5, 60)):
        x = torch.randn(*shape, 32, dtype=torch.float64)
        torch.testing.assert_close(run(program, x), memory(x), rtol=0, atol=1e-12)


def test_backbone_of_operators_of_pytorch():
    """Whatever reads an exported program does not know the operators of this package."""
    arch = dict(depths=[1, 1], channels=[8, 16], mem_channels=16)
    model = ConvNeur(arch, out_indices=(0, 1), memory_cfg=dict(chunk_size=30)).eval()
    x = torch.randn(1, 3, 61, 77)
    program = export(model, x)
    for found, expected in zip(run(program, x), model(x)):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    for graph in (program.graph, *(m.graph for m in program.graph_module.modules() if hasattr(m, 'graph'))):
        assert not [node for node in graph.nodes if 'convneur' in str(node.target)]


def test_states_are_refused():
    class Carries(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = NeuralMemory(16)

        def forward(self, x):
            return self.memory(x, return_state=True)

    with pytest.raises(ValueError, match='begins anew with each image'):
        export(Carries(), torch.randn(1, 5, 16))
    assert not torch.compiler.is_exporting()
