"""The check of the environment: what does not fit is named where it is used, with a command that mends it."""
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from convneur_mm import stack
from convneur_mm.engine import launch
from convneur_mm.stack import PACKAGES, StackError, check_packages, require

ROOT = Path(__file__).parents[1]
FORKS = {package.fork.split('==')[0]: package.fork.split('==')[1] for package in PACKAGES.values()}
UPSTREAM = {'mmengine': '0.10.7', 'mmcv-lite': '2.1.0', 'mmdet': '3.3.0', 'mmsegmentation': '1.2.2',
            'mmpretrain': '1.2.0'}
BOTH = pytest.mark.parametrize('family, versions', [('fork', FORKS), ('upstream', UPSTREAM)], ids=['fork', 'upstream'])
ADVICE = r'Mend with: (.*)$'


def commands(error: Exception) -> list[list[str]]:
    """Return the arguments of the commands that an error names."""
    message = str(error)
    assert '\n' not in message
    return [shlex.split(command) for command in re.search(ADVICE, message)[1].split(' && ')]


def requirements(family: str, *names: str) -> list[str]:
    return [part for name in names for part in getattr(PACKAGES[name], family).split()]


@BOTH
def test_whole_environments_pass(family, versions):
    check_packages(versions, PACKAGES, 'a detector')
    check_packages({**versions, 'mmcv': '2.1.0'} if family == 'upstream' else versions, PACKAGES, 'a detector')


def test_this_environment_passes():
    stack.check_stack()


@pytest.mark.parametrize('file, family', [('primary', 'fork'), ('openmmlab', 'upstream')])
def test_versions_are_those_of_the_requirement_files(file, family):
    lines = (ROOT / 'requirements' / f'{file}.txt').read_text().splitlines()
    listed = [line.split('#')[0].strip() for line in lines]
    assert set(requirements(family, *PACKAGES)) <= {*listed}
    assert f'torch>={".".join(map(str, stack.OLDEST_TORCH))}' in listed


@BOTH
@pytest.mark.parametrize('name', PACKAGES)
def test_a_missing_package(family, versions, name):
    left = {key: version for key, version in versions.items() if key not in sum(stack.distributions(name), [])}
    check_packages(left, [other for other in PACKAGES if other != name], 'another')
    with pytest.raises(StackError, match=f'^a detector needs {name}, not installed here') as error:
        check_packages(left, PACKAGES, 'a detector')
    assert commands(error.value) == [['pip', 'install', *requirements(family, name)]]


def test_nothing_of_openmmlab():
    with pytest.raises(StackError, match='needs mmengine, mmcv, mmdet, not') as error:
        check_packages({'torch': '2.14.1'}, ['mmengine', 'mmcv', 'mmdet'], 'mmdet.models')
    assert commands(error.value) == [['pip', 'install', *requirements('fork', 'mmengine', 'mmcv', 'mmdet')]]


@pytest.mark.parametrize('versions, name', [
    ({**UPSTREAM, 'mmdet': '2.28.2'}, 'mmdet'), ({**UPSTREAM, 'mmcv-lite': '1.7.2'}, 'mmcv'),
    ({**FORKS, 'onedl-mmengine': '0.9.1'}, 'mmengine'), ({**FORKS, 'onedl-mmengine': '0.dev0.20'}, 'mmengine')])
def test_a_package_that_is_too_old(versions, name):
    with pytest.raises(StackError, match=rf'\({name}\) is too old: expected at least {PACKAGES[name].oldest}') as error:
        check_packages(versions, PACKAGES, 'a detector')
    family = 'upstream' if 'mmdet' in versions else 'fork'
    assert commands(error.value) == [['pip', 'install', *requirements(family, name)]]


def test_families_over_each_other():
    """Both go, as uninstalling one takes files of the other. What is not used is nobody's concern."""
    versions = {**FORKS, 'mmengine': '0.10.7', 'mmdet': '3.3.0'}
    check_packages(versions, ['mmcv', 'mmseg'], 'a segmentor')
    with pytest.raises(StackError, match='are installed over each other') as error:
        check_packages(versions, PACKAGES, 'a detector')
    assert commands(error.value) == [
        ['pip', 'uninstall', '-y', 'onedl-mmengine', 'mmengine', 'onedl-mmdetection', 'mmdet'],
        ['pip', 'install', *requirements('fork', 'mmengine', 'mmdet')]]


@pytest.mark.parametrize('version, fits', [('2.9.1', False), ('2.10.0+cpu', True), ('2.14.1', True), ('1.13.1', False),
                                           ('3.0.0a0+git', True)])
def test_torch_from_2_10_on(monkeypatch, version, fits):
    monkeypatch.setattr(stack, 'import_module', lambda name: SimpleNamespace(__version__=version))
    if fits:
        stack.check_torch()
    else:
        with pytest.raises(StackError, match=f'torch {re.escape(version)} is too old: expected at least 2.10') as error:
            stack.check_torch()
        assert commands(error.value) == [['pip', 'install', '--upgrade', 'torch', 'torchvision']]


@pytest.mark.parametrize('module, error, expected', [
    ('mmdet.models', ImportError("cannot import name 'x' from partially initialized module 'mmdet'\n(most likely due "
                                 'to a circular import)'),
     r'mmdet\.models is installed, but importing it fails with ImportError: .*circular import'),
    ('mmdet', AssertionError('MMCV==9 is used but incompatible'), 'AssertionError: MMCV==9 is used but incompatible'),
    ('cv2', ImportError('libGL.so.1: cannot open shared object file'), 'libGL.so.1.*apt-get install libgl1 libglib2.0'),
    ('torchvision', RuntimeError('operator torchvision::nms does not exist'),
     'another torch. Mend with: pip uninstall -y torch torchvision && pip install torch torchvision'),
    ('mmcv._ext', ImportError('undefined symbol: _ZN3c10'), 'undefined.*--force-reinstall .*--no-cache-dir .*mmcv'),
])
def test_a_package_that_does_not_import_is_named(module, error, expected):
    def load(name):
        raise error

    with pytest.raises(StackError, match=expected) as raised:
        stack.import_module(module, load)
    assert '\n' not in str(raised.value)


@pytest.mark.needs('mmcv')
def test_mmcv_without_cuda_is_named_where_there_is_a_gpu(monkeypatch):
    import mmcv.ops
    for gpu, compiled in ((True, '13.0'), (False, 'not available')):
        monkeypatch.setattr('torch.cuda.is_available', lambda gpu=gpu: gpu)
        monkeypatch.setattr(mmcv.ops, 'get_compiling_cuda_version', lambda compiled=compiled: compiled)
        stack.check_cuda_operators()
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    with pytest.raises(StackError, match='compiled without CUDA.* pip uninstall -y mmcv onedl-mmcv && pip install'):
        stack.check_cuda_operators()


@pytest.fixture
def without_mmdet(monkeypatch):
    """An environment that holds all but mmdet."""
    versions = {name: version for name, version in FORKS.items() if name != 'onedl-mmdetection'}
    monkeypatch.setattr(stack, 'installed_versions', lambda: versions)
    monkeypatch.setattr('mmengine.config.config.is_installed', lambda package: package != 'mmdet')
    require.cache_clear()
    yield
    require.cache_clear()


def test_required_module_that_is_not_installed(without_mmdet):
    with pytest.raises(StackError, match=r'^mmdet\.models needs mmdet, not .* pip install onedl-mmdetection==\S+$'):
        require('mmdet.models')


@pytest.mark.needs('mmseg', 'mmpretrain')
def test_what_is_not_required_does_not_matter(without_mmdet):
    """Neither a package that is missing nor, for a classifier, operators that do not load."""
    assert require('mmseg.utils').__name__ == 'mmseg.utils'
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'mmcv._ext', None)
        assert require('mmpretrain.models').__name__ == 'mmpretrain.models'
        with pytest.raises(StackError, match='mmcv._ext is installed, but'):
            require('mmseg.models')


@pytest.mark.parametrize('text', ["_base_ = 'mmdet::_base_/default_runtime.py'", "default_scope = 'mmdet'"])
def test_a_config_for_a_package_that_is_not_installed(without_mmdet, tmp_path, text):
    """MMEngine would end in the KeyError of a registry, or name no command."""
    config = tmp_path / 'config.py'
    config.write_text(text)
    with pytest.raises(launch.LaunchError, match=r'^mmdet\S* needs mmdet, .* Mend with: '):
        launch.read_config(str(config), {})


def test_a_config_without_an_openmmlab_scope_needs_none(without_mmdet, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text("value = 1\ncustom_imports = dict(imports=['json'])")
    assert launch.read_config(str(config), dict(other=2)).other == 2
    config.write_text("custom_imports = dict(imports=['no_such_module'])")
    with pytest.raises(ImportError, match='no_such_module'):
        launch.read_config(str(config), {})


# ---- imports in an environment that has nothing but what is named


def import_without_others(code: str, *packages: str) -> subprocess.CompletedProcess:
    """Run code in an interpreter that finds, of what is installed, only these packages and what they need."""
    allowed = sorted(closure(packages))
    hide = f"""if True:
        import sys
        from importlib import metadata
        from importlib.machinery import PathFinder
        owners = metadata.packages_distributions()  # by import name
        allowed = set({allowed!r})
        shown = {{name for name, owner in owners.items() if allowed & {{d.lower().replace('_', '-') for d in owner}}}}

        class Finder(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                if path is None and name in owners and name not in shown:
                    return None
                return super().find_spec(name, path, target)

        sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
    """
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', f'{hide}\n{code}'], capture_output=True, text=True)


def closure(names: tuple[str, ...]) -> set[str]:
    """Return the distributions that these need in turn, themselves included, by canonical name."""
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    found, left = {'convneur-mm'}, [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for requirement in map(Requirement, needs):
            if not requirement.marker or requirement.marker.evaluate(dict(extra='')):
                left.append(canonicalize_name(requirement.name))
    return found


FORWARD = """
import torch
model = {model}
y = model(torch.randn(2, 3, 64, 64))
sum(x.mean() for x in ([y] if torch.is_tensor(y) else y)).backward()
print(sorted(set(sys.modules) & {{'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'pycocotools', 'mmengine'}}))
"""


def test_the_core_needs_torch_torchvision_and_mmengine_alone():
    """Of OpenCV it needs what mmengine imports without naming it."""
    core = ('torch', 'torchvision', 'onedl-mmengine', 'mmengine', 'opencv-python')
    done = import_without_others('import convneur_mm, convneur_mm.ops, convneur_mm.engine.launch' + FORWARD.format(
        model="convneur_mm.models.ConvNeur(arch='m1', drop_path_rate=0.1)"), *core)
    assert done.stdout == "['mmengine']\n", done.stderr
    refused = import_without_others('import pycocotools', *core)
    assert 'No module named' in refused.stderr


@pytest.mark.needs('timm')
def test_timm_s_models_need_torch_and_timm_alone():
    done = import_without_others('import convneur_mm.timm, timm' + FORWARD.format(
        model="timm.create_model('convneur_m1')"), 'torch', 'timm')
    assert done.stdout == "['timm']\n", done.stderr
    refused = import_without_others('import convneur_mm.timm, mmengine', 'torch', 'timm')
    assert 'No module named' in refused.stderr
