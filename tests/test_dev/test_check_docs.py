"""dev/check_docs.py: the pages fit the code, and what would not fit is found."""
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Run by the tool alone: inference of a whole detector, at its own image size.
SLOW = ('DetInferencer', 'work_dirs/m3/epoch_12.pth')
pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')


@pytest.fixture(scope='module')
def docs():
    spec = importlib.util.spec_from_file_location('check_docs', ROOT / 'dev' / 'check_docs.py')
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__('sys').modules, 'check_docs', module)
        spec.loader.exec_module(module)
        yield module


def test_all_pages(docs, monkeypatch, capsys):
    """Files, commands, configs, and the snippets that take a second or so."""
    blocks = docs.blocks
    monkeypatch.setattr(docs, 'blocks', lambda page: [
        block for block in blocks(page) if not any(name in block.text for name in SLOW)])
    assert docs.check(docs.PAGES, run=False) == []
    out = capsys.readouterr().out
    assert 'README.md' in docs.PAGES and 'docs/faq.md' in docs.PAGES and 'docs/api/models.md' in docs.PAGES
    assert out.count(': config (') > 8 and out.count(': snippet (') > 4


@pytest.fixture
def page(docs, tmp_path, monkeypatch):
    """Errors of a page of this text, in a checkout that has the folders of this one."""
    (tmp_path / 'checkout').mkdir()
    for name in ('tools', 'experiments', 'dev', 'configs', 'convneur_mm', 'requirements'):
        (tmp_path / 'checkout' / name).symlink_to(ROOT / name)
    monkeypatch.setattr(docs, 'ROOT', tmp_path / 'checkout')

    def errors(text, run=False):
        (tmp_path / 'checkout' / 'page.md').write_text(text)
        return docs.check(['page.md'], run)

    return errors


@pytest.mark.parametrize('command, message', [
    ('tools/trane.py CONFIG', 'tools/trane.py is not there'),
    ('tools/train.py configs/convneur_m9.py', 'configs/convneur_m9.py is not there'),
    ('tools/train.py CONFIG --ampp', 'tools/train.py has no option --ampp'),
    ('tools/dist_train.sh CONFIG 4 --out x', 'tools/train.py has no option --out'),
    ('NODES=2 tools/dist_train.sh CONFIG 4', 'no tool reads the variable NODES'),
    ('convneur-mm trane CONFIG', "convneur-mm has no command 'trane'"),
    ('convneur-mm infer CONFIG X Y --size 3', 'tools/infer.py has no option --size'),
    ('python3 train.py', 'nothing is known of the program python3'),
    ('pip install -r requirements/none.txt', 'requirements/none.txt is not there'),
])
def test_wrong_commands(page, command, message):
    assert page(f'a\n```bash\n{command}\n```\n') == [f'page.md:3: {message}' + (
        ', or cannot be executed' if 'trane.py' in command else '')]


@pytest.mark.parametrize('command', [
    'tools/train.py configs/convneur_m3_300e_in1k.py --work-dir x --cfg-options a.b=1 \\\n    --resume',
    'NNODES=2 NODE_RANK=0 tools/dist_train.sh CONFIG 4 --amp bf16  # on --all nodes',
    'tools/analysis/get_flops.py CONFIG --shape 512 2048 --cfg-options model.x=1', 'convneur-mm --help', '# nothing',
])
def test_right_commands(page, command):
    assert page(f'```bash\n{command}\n```\n') == []


def test_files(page):
    assert page('see `tools/none.py` and `tools/train.py CONFIG`') == ['page.md: tools/none.py is not there']
    assert page('see [this](other.md#part), [that](https://example.org/x) and `tests/test_X/test_Y.py`') == [
        'page.md: other.md is not there']


@pytest.mark.parametrize('text, message', [
    ("_base_ = __import__('convneur_mm').config('convneur_m1_shapes')\nmodel = dict(backbone=dict(arch='m9'))\n",
     "page.md:2: config: ValueError: "),
    ("custom_imports = dict(imports=['convneur_mm'])\nmodel = dict(backbone=dict(type='ConvNeur', depth=3))\n",
     'page.md:2: config: TypeError: '),
    ("import torch\nassert torch.ones(1) == 2, 'not two'\n", 'page.md:2: snippet: AssertionError: not two'),
    ('import torch\nx = (\n', 'page.md:2: snippet: SyntaxError: '),
])
def test_wrong_snippets(page, text, message):
    error, = page(f'```python\n{text}```\n')
    assert error.startswith(message)


def test_other_blocks(page, docs):
    error, = page('```toml\na = 1\n```\n')
    assert error == "page.md:2: nothing checks blocks of 'toml'; expected bash, python, text, yaml"
    with pytest.raises(docs.DocsError, match=r'page\.md:1: the block has no end'):
        page('```bash\ntools/train.py CONFIG\n')


@pytest.mark.parametrize('text, message', [
    ('a: [1\n', 'page.md:2: yaml: ParserError: '),
    ('a:\n  - {command: [tools/trane.py, CONFIG]}\n', 'page.md:2: tools/trane.py is not there'),
    ('command: [bash, -c, "NODES=1 tools/train.py CONFIG"]\n', 'page.md:2: no tool reads the variable NODES'),
    ('command: [bash, -c, "NNODES=$N tools/train.py CONFIG $resume\\ntools/train.py CONFIG --ampp"]\n',
     'page.md:2: tools/train.py has no option --ampp'),
])
def test_wrong_yaml(page, text, message):
    error, = page(f'```yaml\n{text}```\n')
    assert error.startswith(message)


@pytest.mark.slow
def test_commands_are_run(page, capsys):
    """A failing one is an error, one that is left out is listed."""
    error, = page('```bash\nconvneur-mm --help\ndocker build .\n'
                  'tools/analysis/print_config.py CONFIG --key model.none\n```\n', run=True)
    out = capsys.readouterr().out
    assert 'page.md:2: convneur-mm --help (' in out
    assert 'page.md:2: left out, as it needs Docker: docker build .' in out
    assert 'exit code 2: ' in error and 'model.none' in error


def test_each_page_has_a_folder(docs, page, monkeypatch):
    """As two pages may have the same command, whose results must not be there yet."""
    folders = []
    monkeypatch.setattr(docs, 'run_command', lambda command, folder, stand_ins: folders.append(folder))
    assert page('```bash\nconvneur-mm --help\nconvneur-mm doctor\n```\n', run=True) == []
    (docs.ROOT / 'other.md').write_text('```bash\nconvneur-mm --help\n```\n')
    assert docs.check(['page.md', 'other.md'], run=True) == []
    assert folders[2] == folders[3] != folders[4]


@pytest.mark.slow
def test_site(docs, tmp_path):
    """Without a warning, with all pages."""
    pytest.importorskip('mkdocs', reason='pip install -r requirements/docs.txt')
    docs.build_site(tmp_path)
    for page in docs.PAGES:
        if page.startswith('docs/'):
            assert (tmp_path / page.removeprefix('docs/')).with_suffix('.html').stat().st_size > 5000
    models = (tmp_path / 'api' / 'models.html').read_text()
    assert 'init_weights' in models and '<code>NeuralMemory</code>' in models
    for path in (tmp_path / 'api').iterdir():
        assert ':class:' not in path.read_text() and '====' not in path.read_text(), path.name
