"""Packaging. The wheel carries ``configs/``, ``tools/`` and ``model-index.yml`` under ``convneur_mm/.mim`` for ``mim``.

Where torch is installed already (``pip install --no-build-isolation``) the memory's CPU kernels are compiled for it. In
pip's build isolation there is no torch, so the package is pure Python then and needs no compiler.
"""
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = '0.1.0'
KERNELS = 'convneur_mm/ops/neural_memory/csrc'


class BuildWithConfigs(build_py):
    """Copies what ``mim`` reads into the built package; an editable install reads it from the checkout."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        # Of an earlier build; modules that are gone since would come along.
        shutil.rmtree(Path(self.build_lib) / 'convneur_mm', ignore_errors=True)
        super().run()
        for folder in ('configs', 'tools'):
            target = Path(self.build_lib) / 'convneur_mm' / '.mim' / folder
            shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT / 'model-index.yml', target.parent)


def kernels() -> dict:
    """setup()'s arguments for the CPU kernels: nothing without torch, and no error where they do not compile."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}

    class BuildKernels(BuildExtension):
        """An optional extension that does not compile is skipped; here, also where there is nothing to compile with."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (OSError, subprocess.CalledProcessError) as error:
                self.announce(f'without CPU kernels, as the compiler does not run: {error}', level=3)

        def build_extension(self, extension: CppExtension) -> None:
            # What an editable install has compiled from the same files; another compilation takes a minute.
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
    # And it fits the functions that call it: what it was compiled from is kept in it, for cpu.py to compare.
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
setup(
    name='convneur-mm',
    version=VERSION,
    description='ConvNeur, a backbone with a neural memory for dense prediction, as an OpenMMLab plugin suite',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=find_packages(include=['convneur_mm', 'convneur_mm.*']),
    include_package_data=False,
    entry_points={'console_scripts': ['convneur-mm = convneur_mm.cli:main']},
    python_requires='>=3.10',
    # Empty on purpose: the import of convneur_mm names what is missing. The two families of OpenMMLab packages share
    # import names, and pip would install one over the other. For torch pip would replace builds that it takes for older
    # ones (NVIDIA's containers have such as 2.9.0a0), and for torchvision the torch that is there by the newest.
    install_requires=[],
    ext_modules=compiled.get('ext_modules', []),
    cmdclass={'build_py': BuildWithConfigs, **compiled.get('cmdclass', {})},
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
    ],
)
