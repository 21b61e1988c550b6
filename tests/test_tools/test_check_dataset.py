"""tools/check_dataset.py: its exit codes, its options and what it prints."""
import runpy
import subprocess

import pytest
from data_sets import IMAGES, MAKERS, NUM_TRAIN, TOOL, arguments
from warm_python import warm_python


def test_the_tool_takes_a_list(listed, capfd, refused):
    main = runpy.run_path(str(TOOL))['main']
    command = ['imagenet', str(listed[0]), '--ann-file', str(listed[1]), '--workers', '1']
    assert main(command) == 0
    assert main([*command, '--num-classes', '5']) == 1
    assert 'the label must be below 5, got 5' in capfd.readouterr().out
    with refused(f'no such file: {listed[1].with_name("train.txt")}'):
        main([*command[:3], str(listed[1].with_name('train.txt'))])


def test_the_tool_takes_label_maps_whose_zero_is_a_class(root, capfd):
    main = runpy.run_path(str(TOOL))['main']
    command = ['ade20k', *arguments('ade20k', root), '--num-classes', '6', '--workers', '1']
    assert main(command) == 0
    assert main([*command, '--keep-zero-label']) == 1
    assert 'has values above 5: 6 (' in capfd.readouterr().out


@pytest.mark.parametrize('form', MAKERS)
def test_the_tool_tells_by_its_exit_code(root, capfd, form):
    main = runpy.run_path(str(TOOL))['main']
    command = [form, *arguments(form, root), '--workers', '2', *(['--num-classes', '6'] if form == 'ade20k' else [])]
    assert main(command) == 0
    assert 'no faults' in capfd.readouterr().out
    path = root / IMAGES[form]
    path.write_bytes(path.read_bytes()[:-99])
    assert main(command) == 1
    assert f'faults: 1 (1 unreadable)\n  {path}: does not decode' in capfd.readouterr().out
    assert main([*command, '--max-shown', '0']) == 1
    assert capfd.readouterr().out.endswith('faults: 1 (1 unreadable)\n  ... and 1 more\n')


@pytest.mark.parametrize('form, place', [('coco', 0), ('coco', 1), ('ade20k', 0), ('ade20k', 1), ('imagenet', 0)])
def test_the_tool_names_a_path_that_does_not_exist(clean, refused, form, place):
    main = runpy.run_path(str(TOOL))['main']
    paths = arguments(form, clean)
    paths[place] = str(clean / 'nowhere')
    with refused(f'{clean}/nowhere'):
        main([form, *paths])


@pytest.mark.parametrize('words', [
    ['imagenet', '--workers', '0'], ['imagenet', '--max-shown', '-1'], ['imagenet', '--workers', 'x'], ['coco'], [],
    ['ade20k', '.', '.', '--num-classes', '255']])
def test_the_tool_refuses_wrong_usage(clean, capfd, words):
    main = runpy.run_path(str(TOOL))['main']
    try:
        code = main([*words[:1], *arguments('imagenet', clean), *words[1:]] if words[:1] == ['imagenet'] else words)
    except SystemExit as error:
        code = error.code
    assert code == 2 and 'error: ' in capfd.readouterr().err


def test_the_tool_runs_by_itself(root):
    """The exit code and the report reach the shell, and the progress does not mix with the report."""
    (root / 'imagenet/train/empty').mkdir()
    done = subprocess.run([warm_python(), str(TOOL), 'imagenet', *arguments('imagenet', root)], capture_output=True,
                          text=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f'ImageNet data set {root}/imagenet/train: {NUM_TRAIN} images')
    assert done.stdout.endswith(f'faults: 1 (1 empty class)\n  {root}/imagenet/train/empty: class folder without an '
                                'image\n')
    assert f'{NUM_TRAIN}/{NUM_TRAIN}' in done.stderr
