"""A picture as a trained model sees it: its prediction and the parts of the gated blocks."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor

from ..apis import Prediction, iter_inference
from ..apis.predict import Image
from .gate import BlockParts, GateRecorder


class GateView(NamedTuple):
    """The result of :func:`look`.

    Attributes:
        prediction (Prediction): The picture as loaded, and the model's data sample.
        picture (np.ndarray): Input of the network, resized and cropped by the config's test pipeline, without padding,
            (H, W, 3), RGB, uint8.
        parts (list[BlockParts]): Parts of the one image. Padding, if any, has positions too.
    """

    prediction: Prediction
    picture: np.ndarray
    parts: list[BlockParts]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name: ``picture``, and e.g. ``stage1.block1.before`` of :meth:`BlockParts.arrays`."""
        return {'picture': self.picture, **{f'{part.name}.{name}': array for part in self.parts
                                            for name, array in part.arrays().items()}}


def look(model: BaseModel, image: Image) -> GateView:
    """Predict a picture, and record the gated blocks of the model's ConvNeur meanwhile.

    Args:
        model (BaseModel): Model from :func:`convneur_mm.apis.init_model`.
        image (str | PathLike | np.ndarray): Path of a picture, or an array (H, W, 3) of uint8, BGR.

    Raises:
        ImageError: If the picture cannot be read.
        ValueError: If the model has no ConvNeur with a global branch, or runs it twice for a picture.
    """
    with GateRecorder(model) as recorder:
        prediction, = iter_inference(model, [image])
    return GateView(prediction, network_picture(model, recorder.image, prediction.sample), recorder.parts)


def network_picture(model: BaseModel, image: Tensor, sample: BaseDataElement) -> np.ndarray:
    """Return the input of a backbone, (1, 3, H, W), as 8-bit RGB without its padding."""
    preprocessor = model.data_preprocessor
    pixels = image[0].double()
    if preprocessor._enable_normalize:
        pixels = pixels * preprocessor.std.view(-1, 1, 1) + preprocessor.mean.view(-1, 1, 1)
    # The loader's order is BGR; the preprocessors of mmdet, mmseg 1.2 and mmpretrain swap it if one of these is set.
    names = '_channel_conversion', 'channel_conversion', 'to_rgb'
    if not any(getattr(preprocessor, name, False) for name in names):
        pixels = pixels.flip(0)
    height, width = sample.metainfo['img_shape'][:2]
    return pixels.permute(1, 2, 0)[:height, :width].round().clamp(0, 255).to(torch.uint8).cpu().numpy()
