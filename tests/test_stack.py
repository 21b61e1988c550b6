"""The import check: every broken environment is named, with the command that mends it."""
import re
from pathlib import Path

import pytest

import convneur_mm
from convneur_mm import stack
from convneur_mm.stack import PRIMARY_PINS, StackError, check_operators, check_versions

ROOT = Path(__file__).parents[1]
GOOD = dict(pin.split('==') for pin in PRIMARY_PINS)
UPSTREAM = {'torch': '2.1.2', 'torchvision': '0.16.2', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0',
            'mmsegmentation': '1.2.2', 'mmpretrain': '1.2.0'}


def test_good_stacks_pass():
    check_versions(GOOD)
    check_versions(UPSTREAM)
    check_versions({**GOOD, 'torch': '2.12.1+cpu', 'torchvision': '0.27.1+cpu'})


def test_this_environment_passes():
    stack.check_stack()


def test_pins_are_those_of_the_requirements():
    text = (ROOT / 'requirements' / 'primary.txt').read_text()
    assert sorted(re.findall(r'^((?:torch|onedl)\S*==\S+)$', text, re.M)) == sorted(PRIMARY_PINS)


@pytest.mark.parametrize('name', sorted(GOOD))
def test_missing_package(name):
    versions = {k: v for k, v in GOOD.items() if k != name}
    with pytest.raises(StackError, match=f'needs {name}.* not installed here') as error:
        check_versions(versions)
    assert f'{name}=={GOOD[name]}' in str(error.value).split('Mend with: ')[1]


def test_nothing_installed():
    with pytest.raises(StackError) as error:
        check_versions({})
    command = str(error.value).split('Mend with: ')[1]
    # torch first, then mmcv compiled against it, then the rest: any other order fails or builds without operators.
    positions = [command.index(p) for p in ('torch==', 'MMCV_WITH_OPS=1', 'onedl-mmcv==', 'onedl-mmdetection==')]
    assert positions == sorted(positions)
    assert all(pin in command for pin in PRIMARY_PINS)


@pytest.mark.parametrize('name, version', [('onedl-mmcv', '2.2.0'), ('onedl-mmengine', '0.11.0'),
                                           ('onedl-mmpretrain', '1.4.0')])
def test_wrong_version(name, version):
    with pytest.raises(StackError, match=f'{name} {version} .*does not fit: expected at least') as error:
        check_versions({**GOOD, name: version})
    assert f'{name}=={GOOD[name]}' in str(error.value)


def test_mixed_families():
    with pytest.raises(StackError, match='two families') as error:
        check_versions({**GOOD, 'mmcv': '2.1.0', 'mmengine': '0.10.7'})
    command = str(error.value).split('Mend with: ')[1]
    assert command.startswith('pip uninstall -y mmengine mmcv onedl-mmengine')
    assert all(pin in command for pin in PRIMARY_PINS)


@pytest.mark.parametrize('torch, vision', [('2.13.0+cpu', '0.28.0'), ('2.13.0', '0.27.1'), ('2.12.1+cpu', '0.27.1')])
def test_torchvision_of_another_torch(torch, vision):
    with pytest.raises(StackError, match=re.escape(f'torchvision {vision} was not built for torch {torch}')):
        check_versions({**GOOD, 'torch': torch, 'torchvision': vision})


def test_operators_that_do_not_load():
    def load(name):
        if name == 'mmcv._ext':
            raise ImportError('undefined symbol: _ZN3c106detail')

    with pytest.raises(StackError, match='undefined symbol.*for another torch.*MMCV_WITH_OPS=1'):
        check_operators(load)


def test_version_is_the_package_s():
    assert re.search(r"VERSION = '(.*)'", (ROOT / 'setup.py').read_text())[1] == convneur_mm.__version__
