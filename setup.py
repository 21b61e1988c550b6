"""What ``pyproject.toml`` cannot say: the C++ extension, and the files for ``mim`` in the wheel.

The wheel carries ``configs/``, ``tools/`` and ``model-index.yml`` under ``convneur_mm/.mim``.

Where torch is installed already (``pip install --no-build-isolation``) the memory's CPU kernels are compiled for it. In
pip's build isolation there is no torch, so the package is pure Python then and needs no compiler.
"""
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
KERNELS = 'convneur_mm/ops/neural_memory/csrc'
# Tools that work in a checkout alone.
OF_CHECKOUT = ('quickstart.*', 'run_tests.sh', 'setup_env.sh')


class BuildWithConfigs(build_py):
    """Copy what ``mim`` reads into the built package; an editable install reads it from the checkout."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        # Modules of an earlier build that are gone since would come along.
        shutil.rmtree(Path(self.build_lib) / 'convneur_mm', ignore_errors=True)
        super().run()
        for folder in ('configs', 'tools'):
            target = Path(self.build_lib) / 'convneur_mm' / '.mim' / folder
            shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns('__pycache__', *OF_CHECKOUT))
        shutil.copy(ROOT / 'model-index.yml', target.parent)


def kernels() -> dict:
    """Return setup()'s arguments for the CPU kernels: none without torch; a failed compilation is no error."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}

    class BuildKernels(BuildExtension):
        """Skip the extension also where no compiler runs; setuptools skips an optional one that does not compile."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (OSError, subprocess.CalledProcessError) as error:
                self.announce(f'without CPU kernels, as the compiler does not run: {error}', level=3)

        def build_extension(self, extension: CppExtension) -> None:
            # Reuse what an editable install has compiled from the same files; compiling takes a minute.
            compiled = ROOT / self.get_ext_filename(extension.name)
            sources = [ROOT / name for name in ('setup.py', *extension.sources, *extension.depends)]
            if compiled.exists() and compiled.stat().st_mtime > max(path.stat().st_mtime for path in sources):
                target = Path(self.get_ext_fullpath(extension.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(compiled, target)
            else:
                super().build_extension(extension)

    # Compiled code fits one version of torch, so its name says which: cpu.py looks for that of the running one.
    version = re.sub(r'\W', '_', torch.__version__.split('+')[0])
    # It also fits only the Python code of its time: cpu.py compares this hash of the sources.
    source = hashlib.sha256(b''.join(path.read_bytes() for path in sorted((ROOT / KERNELS).iterdir()))).hexdigest()
    extension = CppExtension(
        f'convneur_mm.ops.neural_memory._cpu_{version}', [f'{KERNELS}/memory.cpp'],
        depends=[f'{KERNELS}/{path.name}' for path in (ROOT / KERNELS).glob('*.h')],
        define_macros=[('SOURCE', f'"{source}"')],
        # GOMP's functions are torch's own: linked with -fopenmp, the module might bring a second pool of threads.
        extra_compile_args=['-O3', '-g0', '-fopenmp', '-fno-math-errno', '-ffp-contract=fast', '-Wno-psabi'],
        optional=True)
    return dict(ext_modules=[extension], cmdclass={'build_ext': BuildKernels.with_options(use_ninja=False)})


compiled = kernels()
setup(ext_modules=compiled.get('ext_modules', []),
      cmdclass={'build_py': BuildWithConfigs, **compiled.get('cmdclass', {})})
