"""convneur_mm.apis.sources: weights are found where users put them, and the documentation lists them."""
import re
from pathlib import Path

import pytest

from convneur_mm.apis.sources import SOURCES, find_source
from convneur_mm.engine.files.weights_file import CheckpointNotFoundError

NAME = 'convnext_pico.d1_in1k'


def test_a_file_of_the_users_comes_first(tmp_path, monkeypatch):
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    with pytest.raises(CheckpointNotFoundError, match=f'/timm/{NAME}/.*weights/{NAME}.safetensors.*apache-2.0'):
        find_source(NAME)
    repo = tmp_path / 'hub' / f'models--timm--{NAME}'
    cached = repo / 'snapshots' / 'a' / 'model.safetensors'
    for path, text in ((cached, 'weights'), (repo / 'refs' / 'main', 'a')):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert find_source(NAME) == cached
    own = Path('weights', f'{NAME}.safetensors')
    own.parent.mkdir()
    own.touch()
    assert find_source(NAME) == own


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="'convnext_huge'; there are convnext_atto"):
        find_source('convnext_huge')


def test_the_documentation_lists_them():
    text = (Path(__file__).parents[2] / 'docs' / 'weights.md').read_text()
    rows = re.findall(r'^\| (m\d) \| `(\S+)` \| (\S+) \| (\S+).* \|$', text, re.MULTILINE)
    assert rows == [(source.arch, name, source.licence, f'{source.top1 or "–"}') for name, source in SOURCES.items()]
