"""Pictures without labels."""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from mmengine.registry import DATASETS
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .check.folders import IMAGENET_SUFFIXES
from .check.images import files_under


@DATASETS.register_module()
class UnlabelledPictures(Dataset):
    """All pictures of a folder and its subfolders, cropped and mirrored at random.

    An item is ``dict(inputs=image)``: uint8, (3, size, size), red, green and blue.

    Args:
        root (str | PathLike): The folder.
        size (int): Height and width of the crops. Defaults to 224.
        scale (tuple[float, float]): Range of a crop's share of its picture's area. Defaults to (0.3, 1.0).

    Raises:
        ValueError: If there are no pictures.
    """

    def __init__(self, root: str | os.PathLike[str], size: int = 224, scale: tuple[float, float] = (0.3, 1.0)) -> None:
        self.root = Path(root)
        self.files = sorted(name for name in files_under(self.root) if name.lower().endswith(IMAGENET_SUFFIXES)) if (
            self.root.is_dir()) else []
        if not self.files:
            raise ValueError(f'{self.root} is no folder with pictures ({", ".join(IMAGENET_SUFFIXES)})')
        self.transform = v2.Compose([
            v2.RandomResizedCrop(size, scale, antialias=True), v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self.root / self.files[index]
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert('RGB'))
        except (OSError, ValueError) as error:
            raise ValueError(f'{path} cannot be read: {error}') from None
        return dict(inputs=self.transform(torch.from_numpy(pixels).permute(2, 0, 1)))
