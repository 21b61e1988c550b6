#!/usr/bin/env python
r"""Check the commands, snippets and paths in README.md, CONTRIBUTING.md, tests/README.md and docs/.

    dev/check_docs.py                       # all pages, or the named ones
    dev/check_docs.py --run                 # runs the commands too, on generated data and weights: ten minutes
    dev/check_docs.py --site site           # builds the site into a folder, with warnings as errors

Commands are lines of ``bash`` blocks, and those in ``yaml`` blocks: their tools, configs, files and options must
exist. Configs in ``python`` blocks are read and their models built; other snippets run in an empty folder, on random
weights. Commands that --run skips are listed with the reason.
"""
import argparse
import ast
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / 'tools/_environment.py'))['prepare']()

ROOT = Path(__file__).resolve().parents[1]
PAGES = ('README.md', 'CONTRIBUTING.md', 'tests/README.md', *sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / 'docs').rglob('*.md')))
# Bash launchers, and the tool that takes their remaining arguments.
TAKES_OPTIONS_OF = {'tools/dist_train.sh': 'tools/train.py', 'tools/slurm_train.sh': 'tools/train.py',
                    'tools/dist_test.sh': 'tools/test.py', 'tools/slurm_test.sh': 'tools/test.py',
                    'tools/quickstart.sh': 'tools/quickstart.py'}
FOLDERS = ('tools/', 'experiments/', 'dev/')  # programs that pages may call by path
# Files that define options of several tools, by the name that such a tool imports.
SHARED_OPTIONS = {'launch': 'convneur_mm/engine/launch/command_line.py', 'bench': 'convneur_mm/analysis/bench.py'}
OTHER_PROGRAMS = ('pip', 'pip-audit', 'uv', 'docker', 'test', '.venv/bin/python', '.venv/bin/pre-commit')

# Why --run does not run a command, by the command's start.
NOT_RUN = {
    'tools/quickstart.sh': 'takes ten minutes and more; tests/test_tools/test_quickstart.py runs it on less',
    'tools/run_tests.sh': 'is what CI runs',
    'tools/setup_env.sh': 'is what CI begins with',
    'tools/dist_train.sh': 'needs COCO, ADE20K or ImageNet; tests/test_configs and tests/test_tools/test_dist.py train',
    'tools/dist_test.sh': 'needs COCO or ADE20K; tests/test_tools/test_dist.py tests on two processes',
    'tools/train.py configs': 'takes minutes or days; tests/test_configs trains every config on generated data',
    'tools/test.py configs': 'needs ADE20K; tests/test_tools/test_test.py tests on generated data',
    'tools/check_dataset.py': 'needs ADE20K; tests/test_tools/test_check_dataset.py checks generated data',
    'MAX_RESTARTS': 'needs COCO, ADE20K or ImageNet; tests/test_engine/test_many_processes.py restarts a training',
    'NNODES': 'needs several machines; tests/test_tools/test_launchers.py looks at what is started',
    'GPUS': 'needs Slurm; tests/test_tools/test_launchers.py stands in for it',
    'pip install': 'would change this environment; tests/test_packaging.py installs the wheel',
    'docker': 'needs Docker',
    'uv': 'would change the lock; tests/test_tools/test_setup.py compares it with the requirements',
    'pip-audit': 'asks a service on the network; .github/workflows/audit.yml runs it',
    '.venv/bin/python tests/helpers/killed_runs.py': 'takes minutes; tests/test_tools/test_killed.py runs it',
    'PYTHONPATH=tests/helpers .venv/bin/python tests/helpers/long_runs.py':
        'takes half an hour; tests/test_tools/test_long_runs.py runs it on less',
    '.venv/bin/': 'would change this environment',
    'tools/publish_model.py': 'needs a training; tests/test_tools/test_publish_model.py publishes one',
    'tools/test.py NAME': 'needs what is published; tests/test_tools/test_publish_model.py tests it',
    'tools/infer.py NAME': 'needs what is published; tests/test_tools/test_publish_model.py loads it',
    'dev/run_mutations.py': 'takes hours',
    'tools/demo.py': 'serves until it is stopped; tests/test_tools/test_demo.py opens the page',
    'experiments/small_ablation.py': 'takes hours, or reads what took hours',
    'experiments/across_sizes.py': 'needs a quick start; tests/test_experiments/test_across_sizes.py tests it',
    'tools/analysis/check_gpu.py': 'needs a GPU; tests/test_tools/test_check_gpu.py runs it in the interpreter',
    'convneur-mm train': 'needs a data set; it is tools/train.py',
}
# Options that --run appends, to keep the run time to minutes.
SHORTER = {'tools/analysis/scaling.py configs/convneur_m1_shapes.py --measure': ('--repeats', '1'),
           'experiments/precision.py': ('--iterations', '2', '--window', '1'),
           'experiments/gradient_tails.py': ('--samples', '2'), 'tools/train_custom.py': ('--epochs', '1'),
           'tools/infer.py CONFIG CHECKPOINT photos': ('--device', 'cpu'),
           'tools/infer.py CONFIG CHECKPOINT street.mp4': ('--device', 'cpu'), 'convneur-mm infer': ('--device', 'cpu')}
CONFIG = 'semantic_fpn_convneur_m1_shapes'  # replaces the word CONFIG

# Code before a page's snippets: names that its text has introduced.
PREAMBLES = {
    'docs/boundary.md': 'import numpy as np\npred = truth = np.zeros((8, 8), int)\n',
    'docs/stream.md': (
        'import torch\nfrom convneur_mm.models import ConvNeur\n'
        "backbone = ConvNeur(dict(depths=[1] * 4, channels=[8] * 4, mem_channels=16)).eval()\nmodel = backbone\n"
        'frames = torch.randn(2, 1, 3, 64, 64)\n'
        'inference_detector, is_cut = lambda model, frame: model(frame), lambda frame: True\n'),
}


class DocsError(ValueError):
    """Raised if a page does not match the code."""


@dataclass(frozen=True)
class Block:
    """Fenced block of a page.

    Attributes:
        page (str): The file, relative to the checkout.
        line (int): Number of its first line.
        language (str): The word after the fence.
        text (str): The lines inside.
    """

    page: str
    line: int
    language: str
    text: str

    def error(self, message: str) -> DocsError:
        return DocsError(f'{self.page}:{self.line}: {message}')

    def commands(self) -> Iterator[str]:
        """Yield the lines without comments, joined where they end in a backslash."""
        for line in self.text.replace('\\\n', ' ').splitlines():
            command = shlex.join(shlex.split(line, comments=True))
            if command:
                yield command

    @property
    def is_config(self) -> bool:
        return bool(re.match(r'(_base_|custom_imports) = ', self.text))


def blocks(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    lines = (ROOT / page).read_text(encoding='utf-8').splitlines()
    start = None
    for number, line in enumerate(lines, start=1):
        if line.startswith('```'):
            if start is None:
                start = number
            else:
                yield Block(page, start + 1, lines[start - 1][3:], '\n'.join(lines[start:number - 1]) + '\n')
                start = None
    if start is not None:
        raise DocsError(f'{page}:{start}: the block has no end')


# ---- static checks


@cache
def options_of(path: str) -> frozenset[str]:
    """Return the options that a tool or its shared modules define, or that a bash script mentions."""
    if path.endswith('.sh'):
        return frozenset(re.findall(r'(?<!\S)--[a-z-]+', (ROOT / path).read_text(encoding='utf-8')))
    tree = ast.parse((ROOT / path).read_text(encoding='utf-8'))
    found, modules = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.update(arg.value for arg in node.args if isinstance(arg, ast.Constant)
                         and isinstance(arg.value, str) and arg.value.startswith('--'))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, 'module', None) or '', *(alias.name for alias in node.names)]
            modules.update(name.rpartition('.')[2] for name in names)
    for name in modules & SHARED_OPTIONS.keys():
        found |= options_of(SHARED_OPTIONS[name])
    return frozenset(found)


def check_command(block: Block, command: str) -> None:
    """Check that the program, the files and the options exist.

    Raises:
        DocsError: If one of them does not exist.
    """
    from convneur_mm.cli import find_tools
    from convneur_mm.paths import config_root
    words = shlex.split(command)
    while '=' in words[0]:
        name = words.pop(0).partition('=')[0]
        if not any(re.search(rf'\b{name}\b', path.read_text(encoding='utf-8')) for path in (
                ROOT / 'tools').glob('**/*.[ps][yh]')):
            raise block.error(f'no tool reads the variable {name}')
    program, *arguments = words
    if program == 'convneur-mm':
        tools = find_tools()
        if arguments[0] == '--help':
            return
        if arguments[0] not in tools:
            raise block.error(f'convneur-mm has no command {arguments[0]!r}')
        program = 'tools/' + tools[arguments[0]].relative_to(config_root().parent / 'tools').as_posix()
    elif program.startswith(FOLDERS):
        if not os.access(ROOT / program, os.X_OK):
            raise block.error(f'{program} is not there, or cannot be executed')
    elif program not in OTHER_PROGRAMS:
        raise block.error(f'nothing is known of the program {program}')
    for word in arguments:
        option, _, value = word.partition('=')
        path = re.match(r'(configs|tools|experiments|dev|requirements|docker|docs|tests)/[^=:]+$', word)
        if path and not (ROOT / word).exists():
            raise block.error(f'{word} is not there')
        if option.startswith('--') and program.startswith(FOLDERS) and program != 'tools/run_tests.sh':
            source = TAKES_OPTIONS_OF.get(program, program)
            if option not in options_of(source) | {'--help'}:
                raise block.error(f'{source} has no option {option}')


def check_paths(page: str) -> None:
    """Check that the files of the repository that a page names or links to exist.

    Raises:
        DocsError: If one does not exist.
    """
    text = (ROOT / page).read_text(encoding='utf-8')
    folders = 'tools|experiments|dev|configs|docs|tests|convneur_mm|requirements|docker'
    named = re.findall(rf'`((?:{folders})/[\w./-]*\w)[` ]', text)
    named = [name for name in named if not re.search(r'[_/][XY]\b', name)]  # X and Y are placeholders
    linked = [link for link in re.findall(r'\]\(([^)#\s]+)', text) if '://' not in link]
    for name, base in [*((name, ROOT) for name in named), *((link, (ROOT / page).parent) for link in linked)]:
        if not (base / name).exists():
            raise DocsError(f'{page}: {name} is not there')


# ---- snippets


def check_config(block: Block, folder: Path) -> None:
    """Read a config and build its model, or its backbone if it has nothing else.

    Raises:
        DocsError: If that fails.
    """
    from mmengine.registry import MODELS, DefaultScope

    from convneur_mm.engine.launch import read_config
    path = folder / 'snippet.py'
    path.write_text(block.text, encoding='utf-8')
    cfg = read_config(str(path), {})
    if '_base_' in block.text:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            MODELS.build(cfg.model)
    else:
        MODELS.build(cfg.model.backbone)


def check_yaml(block: Block) -> None:
    """Parse a block, and check its commands like those of ``bash`` blocks.

    Commands are lists of words, or bash, -c and a script, under the key ``command``.

    Raises:
        DocsError: If a program, file or option does not exist.
    """
    import yaml
    nodes = [yaml.safe_load(block.text)]
    for node in nodes:
        nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        command = node.get('command') if isinstance(node, dict) else None
        if command:
            script = command[2] if command[:2] == ['bash', '-c'] else shlex.join(command)
            for line in Block(block.page, block.line, 'bash', script).commands():
                check_command(block, line)


def check_program(block: Block, folder: Path, stand_ins: 'StandIns') -> None:
    """Run a snippet in ``folder``.

    Raises:
        DocsError: If that fails.
    """
    text = PREAMBLES.get(block.page, '') + block.text
    # Replace the reader's own weights and pictures, and the reader's GPU.
    text = text.replace("device='cuda'", "device='cpu'")
    for name in re.findall(r"'([^']+\.jpg)'", text):
        stand_ins.picture(folder / name)
    for config, name in (('cascade_rcnn_convneur_m3_1x_coco', 'work_dirs/m3/epoch_12.pth'),
                         ('cascade_rcnn_convneur_m3_1x_coco', 'CHECKPOINT'), (CONFIG, 'CHECKPOINT')):
        if f"'{name}'" in text and config in text:
            text = text.replace(f"'{name}'", repr(str(stand_ins.checkpoint(config))))
    text = text.replace("'work_dirs/m3/cascade_rcnn_convneur_m3_1x_coco.py'", "'cascade_rcnn_convneur_m3_1x_coco'")
    before = os.getcwd()
    os.chdir(folder)
    try:
        with redirect_stdout(io.StringIO()):
            exec(compile(text, f'{block.page}:{block.line}', 'exec'), {'__name__': 'snippet'})
    finally:
        os.chdir(before)


# ---- commands, on stand-ins


class StandIns:
    """Weights, pictures and data sets in a folder, for use in place of the reader's.

    Args:
        folder (Path): The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoint(self, config: str) -> Path:
        """Save random weights of a config's model."""
        import torch

        from convneur_mm.apis import init_model
        path = self.folder / f'{config}.pth'
        if not path.exists():
            model = init_model(config, None, 'cpu')
            torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=model.dataset_meta)), path)
        return path

    def picture(self, path: Path) -> Path:
        """Save a generated picture."""
        import cv2

        from convneur_mm.datasets.shapes import single_scene_at
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), single_scene_at(0, 'val', 0, 128).image)
        return path

    def video(self, path: Path) -> Path:
        """Save a video of three frames."""
        import cv2

        from convneur_mm.datasets.shapes import single_scene_at
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), 5, (128, 128))
        for index in range(3):
            writer.write(single_scene_at(0, 'val', index, 128).image)
        writer.release()
        return path

    def data(self, path: Path, form: str) -> Path:
        """Generate a data set."""
        subprocess.run([sys.executable, ROOT / 'tools' / 'make_shapes.py', path, '--format', form, '--num-train', '12',
                        '--num-val', '6', '--image-size', '64'], check=True, capture_output=True)
        return path

    def source_weights(self, path: Path) -> Path:
        """Save random weights of timm's ConvNeXt-V2 Nano."""
        import timm
        import torch
        torch.save(timm.create_model('convnextv2_nano').state_dict(), path)
        return path


def reason_not_to_run(command: str) -> str:
    """Return why --run skips a command; empty if it runs it."""
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), '')


def run_command(command: str, folder: Path, stand_ins: StandIns) -> None:
    """Run a command in ``folder``, with its placeholders replaced.

    Raises:
        DocsError: If its exit code is not 0; gives the end of its output.
    """
    words = shlex.split(command)
    words += next((more for start, more in SHORTER.items() if command.startswith(start)), ())
    config = next((Path(word).stem for word in words if word.startswith('configs/')), CONFIG)
    data = dict(nuts='coco', fields='ade20k', leaves='imagenet')
    for index, word in enumerate(words):
        target = folder / word
        if word == 'CONFIG':
            words[index] = CONFIG
        elif word == 'CHECKPOINT':
            words[index] = str(stand_ins.checkpoint(config))
        elif target.exists() or index == 0:
            continue
        elif word == 'photos':
            stand_ins.picture(target / 'a.jpg')
        elif target.suffix == '.jpg':
            stand_ins.picture(target)
        elif target.suffix == '.mp4':
            stand_ins.video(target)
        elif word.startswith('data/') and target.name in data:
            target.parent.mkdir(exist_ok=True)
            stand_ins.data(target, data[target.name])
        elif target.suffix == '.pt':
            stand_ins.source_weights(target)
    if words[0] == 'convneur-mm':
        words[:1] = [sys.executable, '-m', 'convneur_mm.cli']
    elif words[0].endswith('.py'):
        words[:1] = [sys.executable, str(ROOT / words[0])]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise DocsError(f'exit code {done.returncode}: ' + ' | '.join(lines[-3:]))


# ---- all of it


def check(pages: Sequence[str], run: bool) -> list[str]:
    """Return the errors of the pages, and print a line for each block and command that was run or skipped."""
    from mmengine.logging import MMLogger
    MMLogger.get_current_instance().setLevel('ERROR')  # hide warnings such as that of random weights
    warnings.simplefilter('ignore')
    errors = []
    with tempfile.TemporaryDirectory() as name:
        stand_ins = StandIns(Path(name))
        for page in pages:
            folder = Path(name, page.replace('/', '-'))  # a folder for each page, because pages are independent
            folder.mkdir()
            for link in ('tools', 'configs', 'requirements'):
                (folder / link).symlink_to(ROOT / link)
            try:
                check_paths(page)
            except DocsError as error:
                errors.append(str(error))
            for block in blocks(page):
                errors += check_block(block, folder, stand_ins, run)
    return errors


def check_block(block: Block, folder: Path, stand_ins: StandIns, run: bool) -> list[str]:
    """Return the errors of a block."""
    errors = []

    def attempt(what: str, function, *args) -> None:
        started = time.monotonic()
        try:
            function(*args)
        except Exception as error:  # a snippet may raise anything
            known = isinstance(error, DocsError)
            message = str(error) if known else f'{type(error).__name__}: {error}'
            where = f'{block.page}:{block.line}'
            errors.append(message if message.startswith(where) else f'{where}: {what}: {message}')
        else:
            print(f'{block.page}:{block.line}: {what} ({time.monotonic() - started:.0f} s)', flush=True)

    if block.language == 'python':
        scratch = Path(tempfile.mkdtemp(dir=folder))
        if block.is_config:
            attempt('config', check_config, block, scratch)
        else:
            attempt('snippet', check_program, block, scratch, stand_ins)
        shutil.rmtree(scratch)
    elif block.language == 'bash':
        for command in block.commands():
            try:
                check_command(block, command)
            except DocsError as error:
                errors.append(str(error))
                continue
            reason = reason_not_to_run(command)
            if run and reason:
                print(f'{block.page}:{block.line}: left out, as it {reason}: {command}', flush=True)
            elif run:
                attempt(command, run_command, command, folder, stand_ins)
    elif block.language == 'yaml':
        attempt('yaml', check_yaml, block)
    elif block.language not in ('', 'bibtex', 'text'):
        errors.append(str(block.error(f'nothing checks blocks of {block.language!r}; expected bash, python, text, '
                                      'yaml')))
    return errors


def build_site(folder: Path) -> None:
    """Build the site, with warnings as errors.

    Raises:
        DocsError: If mkdocs finds an error; gives its last lines.
    """
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', folder.resolve()]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'}, capture_output=True,
                          text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if re.match('(WARNING|ERROR|Aborted)', line)]
        raise DocsError('\n'.join(lines or done.stderr.splitlines()[-5:])
                        or 'mkdocs failed: pip install -r requirements/docs.txt')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pages', nargs='*', default=PAGES, metavar='PAGE',
                        help='path of a page, relative to the root of the checkout (default: all)')
    parser.add_argument('--run', action='store_true', help='also run the commands')
    parser.add_argument('--site', type=Path, metavar='DIR',
                        help='build the site into this folder and check nothing else')
    args = parser.parse_args(argv)
    for page in args.pages:
        if not (ROOT / page).is_file():
            parser.error(f'{page} is no page of the checkout')
    try:
        if args.site:
            build_site(args.site)
            print(f'the site is in {args.site}')
            return
        errors = check(args.pages, args.run)
    except DocsError as error:
        errors = [str(error)]
    for error in errors:
        print(f'error: {error}', file=sys.stderr)
    sys.exit(1 if errors else None)


if __name__ == '__main__':
    main()
