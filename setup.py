"""Packaging. The wheel carries ``configs/`` and ``tools/`` under ``convneur_mm/.mim``, where ``mim`` looks for them."""
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = '0.1.0'


class BuildWithConfigs(build_py):
    """Copies ``configs/`` and ``tools/`` into the built package; an editable install reads them from the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in ('configs', 'tools'):
            target = Path(self.build_lib) / 'convneur_mm' / '.mim' / folder
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns('__pycache__'))


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
    python_requires='>=3.10,<3.13',
    # Empty on purpose: the two families of OpenMMLab packages share import names, and pip would install one
    # beside the other. requirements/ holds the pinned stack, and the import of convneur_mm checks it.
    install_requires=[],
    cmdclass={'build_py': BuildWithConfigs},
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
    ],
)
