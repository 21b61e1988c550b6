"""The import check: every environment that does not fit is named, with commands that mend it."""
import inspect
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import convneur_mm
from convneur_mm import stack
from convneur_mm.engine import launch
from convneur_mm.stack import (
    CORE,
    PRIMARY,
    UPSTREAM,
    Family,
    StackError,
    check_cuda_operators,
    check_operators,
    check_versions,
    require,
)

ROOT = Path(__file__).parents[1]
ALL = tuple(PRIMARY.packages)
OPENMMLAB = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
BOTH = pytest.mark.parametrize('family', [PRIMARY, UPSTREAM], ids=['primary', 'upstream'])
COMPILE = ['MMCV_WITH_OPS=1', 'pip', 'install', '--no-cache-dir', '--no-build-isolation', '--force-reinstall',
           '--no-deps']


def installed(family: Family, *names: str, **changes: str | None) -> dict[str, str]:
    """Versions as after an installation of all packages, or of those named; None takes one away."""
    versions = {name: re.search(r'[=<](\d[.\d]*)', family.packages[name].requirement + '=5.0')[1]
                for name in names or ALL}
    versions.update(changes)
    return {family.packages[name].distribution: version for name, version in versions.items() if version}


def remedy(match: str, versions: dict[str, str], needed=CORE, python=(3, 11), check=check_versions) -> list[list[str]]:
    """Checks versions; the arguments of each command that the error names."""
    with pytest.raises(StackError, match=match) as error:
        check(versions, needed, python=python)
    message = str(error.value)
    assert '\n' not in message
    return [shlex.split(command) for command in re.split('[Mm]end with: ', message)[1].split(' && ')]


def assert_installs(commands: list[list[str]], family: Family, names: set[str]) -> None:
    """The commands install these packages of this family and nothing else, in an order that works.

    torch comes first, then mmcv is compiled against it, then the rest with mmcv's own requirements: any other order
    fails, or builds mmcv without operators.
    """
    expected = []
    if names & {'torch', 'torchvision'}:
        expected.append(['pip', 'install', *requirements(family, names & {'torch', 'torchvision'}), *family.limits])
    compiled = names & set(OPENMMLAB[1:])
    if compiled:
        expected.append(['pip', 'install', *family.build_tools])
    if 'mmcv' in names:
        expected.append([*COMPILE, *requirements(family, {'mmcv'})])
    rest = requirements(family, names - {'torch', 'torchvision'})
    if rest:
        rest += [limit for limit in family.limits if limit not in rest]
        expected.append(['pip', 'install', *(['--no-build-isolation'] if compiled else []), *rest])
    assert commands == expected


def requirements(family: Family, names: set[str]) -> list[str]:
    return [requirement for name in ALL if name in names for requirement in family.packages[name].requirement.split()]


@BOTH
def test_good_stacks_pass(family):
    check_versions(installed(family))
    check_versions(installed(family), needed=ALL)
    check_versions(installed(family, *CORE))
    check_versions({**installed(family), 'torch': '2.12.1+cpu', 'torchvision': '0.27.1+cpu'})


def test_this_environment_passes():
    stack.check_stack()


@pytest.mark.parametrize('file, family', [('primary', PRIMARY), ('openmmlab', UPSTREAM)])
def test_versions_are_those_of_the_requirement_files(file, family):
    listed = [line.split('#')[0].strip() for line in (ROOT / 'requirements' / f'{file}.txt').read_text().splitlines()]
    named = {requirement for package in family.packages.values() for requirement in package.requirement.split()}
    assert {line for line in listed if '==' in line} == {requirement for requirement in named if '==' in requirement}
    assert {*family.limits, family.build_tools[0]} <= {*listed}
    tools = (ROOT / 'requirements' / 'build.txt').read_text().split('\n')
    assert set(family.build_tools[1:]) <= set(tools)
    assert set(listed) - {''} >= named - {'opencv-python'}


def test_upper_limits_of_the_upstream_stack():
    """What pip would go beyond, and torch 2.1 cannot do with."""
    listed = [line.split('#')[0].strip() for line in (ROOT / 'requirements/openmmlab.txt').read_text().splitlines()]
    assert set(UPSTREAM.limits) == {line for line in listed if '<' in line and 'setuptools' not in line}
    assert not PRIMARY.limits


def test_core_requirements():
    """They repeat no version, and take those of the whole stack."""
    lines = [line.split('#')[0].strip() for line in (ROOT / 'requirements' / 'core.txt').read_text().splitlines()]
    assert lines[1] == '-c primary.txt'
    assert set(lines[2:]) == {PRIMARY.packages[name].distribution for name in CORE}


@BOTH
@pytest.mark.parametrize('name', CORE)
def test_missing_core_package(family, name):
    commands = remedy(f'convneur_mm needs {family.packages[name].distribution}.* not installed here',
                      installed(family, **{name: None}))
    assert_installs(commands, family, {name})


@BOTH
@pytest.mark.parametrize('name', OPENMMLAB[1:])
def test_missing_package_of_the_whole_stack(family, name):
    """The models do without it, and name it where something needs it."""
    versions = installed(family, **{name: None})
    check_versions(versions)
    commands = remedy(f'needs {family.packages[name].distribution}.* not installed here', versions, needed=ALL)
    assert_installs(commands, family, {name})


@BOTH
def test_missing_torch_and_torchvision(family):
    assert_installs(remedy('needs torch, torchvision, not', installed(family, torch=None, torchvision=None)), family,
                    {'torch', 'torchvision'})


@BOTH
def test_missing_all_beside_the_core(family):
    assert_installs(remedy('mmcv', installed(family, *CORE), needed=ALL), family, set(OPENMMLAB[1:]))


@pytest.mark.parametrize('distributions, found, version', [
    ({'opencv-python': '4.10.0'}, True, '4.10.0'), ({}, True, 'unknown'), ({}, False, None)])
def test_opencv_of_any_name_is_found(monkeypatch, distributions, found, version):
    """As opencv-python-headless, or as the system's package, which no distribution names."""
    def installed_version(name):
        if name not in distributions:
            raise metadata.PackageNotFoundError(name)
        return distributions[name]

    monkeypatch.setattr(stack.metadata, 'version', installed_version)
    monkeypatch.setattr(stack.importlib.util, 'find_spec', lambda name: name == 'cv2' and found or None)
    assert stack.installed_versions() == ({'opencv-python': version} if version else {})


def test_nothing_installed():
    assert_installs(remedy('needs torch, torchvision', {}), PRIMARY, set(CORE))
    assert_installs(remedy('needs torch, torchvision', {}, needed=ALL), PRIMARY, set(ALL))


@BOTH
@pytest.mark.parametrize('name, version', [('mmcv', '2.9.0'), ('mmengine', '0.11.0'), ('mmdet', '2.28.2'),
                                           ('mmseg', '0.30.0'), ('mmpretrain', '1.4.0')])
def test_wrong_version(family, name, version):
    distribution = family.packages[name].distribution
    commands = remedy(f'{distribution} {version} .*does not fit: expected at least',
                      installed(family, **{name: version}))
    assert_installs(commands, family, {name})


@BOTH
@pytest.mark.parametrize('name', OPENMMLAB)
def test_the_oldest_version_fits_and_the_first_too_new_one_does_not(family, name):
    _, _, low, high = family.packages[name]
    check_versions(installed(family, **{name: low}))
    assert_installs(remedy(f'{high} .*does not fit', installed(family, **{name: high})), family, {name})


def test_a_version_ends_where_its_numbers_do():
    """0.10.dev0.20 comes before 0.10.8; its 20 is no third number."""
    remedy('0.10.dev0.20 .*does not fit', installed(PRIMARY, mmengine='0.10.dev0.20'))


@BOTH
@pytest.mark.parametrize('torch, vision', [('2.13.0+cpu', '0.28.0'), ('2.13.0', '0.27.1'), ('2.1.2', '0.27.1'),
                                           ('2.12.1', '0.16.2'), ('pinned+cpu', 'pinned')])
@pytest.mark.parametrize('with_mmcv', [True, False], ids=['mmcv', 'core'])
def test_torchvision_of_another_torch(family, torch, vision, with_mmcv):
    pins = installed(family)
    torch, vision = torch.replace('pinned', pins['torch']), vision.replace('pinned', pins['torchvision'])
    versions = installed(family, *(ALL if with_mmcv else CORE), torch=torch, torchvision=vision)
    commands = remedy(re.escape(f'torchvision {vision} was not built for torch {torch}'), versions)
    # pip takes 2.12.1+cpu for 2.12.1, and would leave it there.
    assert commands[0] == ['pip', 'uninstall', '-y', 'torch', 'torchvision']
    # mmcv was compiled for the torch that was there.
    changes = torch.split('+')[0] != pins['torch']
    assert_installs(commands[1:], family, {'torch', 'torchvision', *(['mmcv'] if with_mmcv and changes else [])})


@pytest.mark.parametrize('versions', [
    {**installed(PRIMARY), **installed(UPSTREAM, 'mmcv', 'mmengine')},
    {**installed(UPSTREAM), **installed(PRIMARY, 'mmengine')},
    {**installed(PRIMARY, *CORE), **installed(UPSTREAM, 'mmengine')}], ids=['forks', 'upstream', 'core'])
def test_mixed_families(versions):
    """All of both goes, as their files lie in the same folders; what there was of either comes back."""
    there = [(family, name) for family in (UPSTREAM, PRIMARY) for name in OPENMMLAB
             if family.packages[name].distribution in versions]
    uninstall, *commands = remedy('two families', versions)
    assert uninstall == ['pip', 'uninstall', '-y', *(family.packages[name].distribution for family, name in there)]
    assert_installs(commands, PRIMARY, {*CORE, *(name for _, name in there)})


@pytest.mark.parametrize('changes, match, before', [
    (dict(torch=None, torchvision=None), 'needs torch', []),
    (dict(mmcv='2.2.0'), 'does not fit', []),
    (dict(torchvision='0.27.1'), 'was not built for', ['pip', 'uninstall', '-y', 'torch', 'torchvision'])])
def test_upstream_packages_on_a_python_that_torch_2_1_has_no_wheels_for(changes, match, before):
    versions = installed(UPSTREAM, *CORE, 'mmcv', **changes)
    needed = (*CORE, 'mmcv')
    uninstall, *commands = remedy(match + '.*need Python 3.11 or older', versions, needed, python=(3, 13))
    assert uninstall == ['pip', 'uninstall', '-y', 'mmengine', 'mmcv']
    if before:
        assert commands.pop(0) == before
    torch = {'torch', 'torchvision'} & set(changes)
    assert_installs(commands, PRIMARY, {'mmengine', 'mmcv', *(['torch', 'torchvision'] if torch else [])})


def test_advice_is_for_the_running_python():
    assert (sys.version_info.major, sys.version_info.minor) == stack.RUNNING_PYTHON
    for function in (check_versions, check_operators, check_cuda_operators):
        assert inspect.signature(function).parameters['python'].default == stack.RUNNING_PYTHON


@pytest.mark.parametrize('python', [(3, 10), (3, 13)])
def test_advice_for_the_primary_stack_is_that_of_any_python(python):
    assert_installs(remedy('needs', installed(PRIMARY, torch=None), python=python), PRIMARY, {'torch'})


@BOTH
def test_mmcv_without_cuda_is_named_where_there_is_a_gpu(family):
    def check_on(gpu, compiled):
        modules = {'torch': SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: gpu)),
                   'mmcv.ops': SimpleNamespace(get_compiling_cuda_version=lambda: compiled)}
        return lambda versions, needed, python: check_cuda_operators(versions, modules.__getitem__, python=python)

    for fits in (check_on(True, '13.0'), check_on(False, 'not available')):
        fits(installed(family), (), (3, 11))
    commands = remedy('without its CUDA operators.* tools/setup_env.sh here; else mend', installed(family),
                      check=check_on(True, 'not available'))
    assert_installs(commands, family, {'mmcv'})


@BOTH
def test_operators_that_do_not_load(family):
    def load(name):
        if name == 'mmcv._ext':
            raise ImportError('undefined symbol: _ZN3c106detail')

    def check(versions, needed, python):
        check_operators(versions, load, python=python)

    commands = remedy('undefined symbol.*for another torch', installed(family), check=check)
    assert_installs(commands, family, {'mmcv'})


def test_operators_are_loaded_after_torch_and_mmcv():
    """They are linked against torch, and without it would be taken for broken."""
    loaded = []
    check_operators(installed(PRIMARY), loaded.append)
    assert loaded == ['torch', 'mmcv', 'mmcv._ext']


def test_an_mmcv_that_does_not_import_is_named():
    def load(name):
        if name == 'mmcv':
            raise AssertionError('MMEngine==0.1 is used but incompatible')

    with pytest.raises(StackError, match='mmcv is installed, but importing it fails with AssertionError: MMEngine==0'):
        check_operators(installed(PRIMARY), load)


@pytest.mark.parametrize('names', [CORE, ALL], ids=['core', 'mmcv'])
def test_what_the_import_of_the_package_checks(monkeypatch, names):
    """OpenCV, whose system libraries a bare machine lacks, and mmcv's operators where mmcv is."""
    calls = []
    monkeypatch.setattr(stack, 'installed_versions', lambda: installed(PRIMARY, *names))
    monkeypatch.setattr(stack, 'import_module', calls.append)
    monkeypatch.setattr(stack, 'check_operators', calls.append)
    stack.check_stack()
    assert calls == ['cv2', *([installed(PRIMARY)] if names == ALL else [])]


def test_the_import_of_the_package_checks_versions(monkeypatch):
    monkeypatch.setattr(stack, 'installed_versions', lambda: installed(PRIMARY, mmengine='0.9.0'))
    with pytest.raises(StackError, match='onedl-mmengine 0.9.0 .*does not fit'):
        stack.check_stack()


@pytest.mark.parametrize('error, expected', [
    (ImportError("cannot import name 'x' from partially initialized module 'mmdet'\n(most likely due to a circular "
                 'import)'), r'mmdet\.models is installed, but importing it fails with ImportError: .*circular import'),
    (AssertionError('MMCV==9 is used but incompatible'), 'AssertionError: MMCV==9 is used but incompatible'),
    (ImportError('libGL.so.1: cannot open shared object file'), 'libGL.so.1.*apt-get install libgl1 libglib2.0-0'),
])
def test_a_package_that_does_not_import_is_named(error, expected):
    def load(name):
        raise error

    with pytest.raises(StackError, match=expected) as raised:
        stack.import_module('mmdet.models', load)
    assert '\n' not in str(raised.value)


@pytest.fixture
def without_mmdet(monkeypatch):
    """An environment that holds all but mmdet."""
    monkeypatch.setattr(stack, 'installed_versions', lambda: installed(PRIMARY, mmdet=None))
    monkeypatch.setattr('mmengine.config.config.is_installed', lambda package: package != 'mmdet')
    require.cache_clear()
    yield
    require.cache_clear()


def test_required_module(monkeypatch):
    """mmcv is needed by all that are required, and checked with its operators."""
    calls = []
    monkeypatch.setattr(stack, 'installed_versions', lambda: installed(PRIMARY))
    monkeypatch.setattr(stack, 'check_operators', calls.append)
    module = SimpleNamespace()
    monkeypatch.setattr(stack, 'import_module', lambda name: calls.append(name) or module)
    require.cache_clear()
    assert require('mmseg.utils') is module and calls == [installed(PRIMARY), 'mmseg.utils']
    require.cache_clear()


def test_required_module_that_is_not_installed(without_mmdet):
    message = (r'^mmdet\.models needs onedl-mmdetection \(mmdet\), not installed here\. Mend with: pip install .* && '
               'pip install --no-build-isolation onedl-mmdetection==')
    with pytest.raises(StackError, match=message):
        require('mmdet.models')


@pytest.mark.parametrize('text', ["_base_ = 'mmdet::_base_/default_runtime.py'", "default_scope = 'mmdet'"])
def test_a_config_for_a_package_that_is_not_installed(without_mmdet, tmp_path, text):
    """MMEngine would end in the KeyError of a registry, or name no command."""
    config = tmp_path / 'config.py'
    config.write_text(text)
    with pytest.raises(launch.LaunchError, match=r'^mmdet\S* needs onedl-mmdetection .* Mend with: '):
        launch.read_config(str(config), {})


def test_a_config_without_an_openmmlab_scope_needs_none(without_mmdet, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text("value = 1\ncustom_imports = dict(imports=['json'])")
    assert launch.read_config(str(config), dict(other=2)).other == 2
    config.write_text("custom_imports = dict(imports=['no_such_module'])")
    with pytest.raises(ImportError, match='no_such_module'):
        launch.read_config(str(config), {})


def test_nothing_but_mmengine_is_imported():
    """By the package, its models and its operators, whatever is installed; mmcv's operators are looked at if it is."""
    code = """if True:
        import sys
        sys.modules.update(dict.fromkeys(('mmdet', 'mmseg', 'mmpretrain', 'mmcv.cnn', 'timm')))  # fails if imported
        import torch, convneur_mm, convneur_mm.models, convneur_mm.ops, convneur_mm.engine.launch
        model = convneur_mm.models.ConvNeur(arch='m1', drop_path_rate=0.1)
        sum(x.mean() for x in model(torch.randn(2, 3, 64, 64))).backward()
    """
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


def test_version_is_the_package_s():
    assert re.search(r"VERSION = '(.*)'", (ROOT / 'setup.py').read_text())[1] == convneur_mm.__version__
