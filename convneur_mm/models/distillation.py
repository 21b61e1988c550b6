"""Train a backbone to predict the features of a teacher on pictures without labels."""
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Teacher(nn.Module):
    """A frozen network that returns feature maps of several strides.

    Args:
        net (nn.Module): Maps normalised images to a sequence of (N, C, H, W), or, with ``watched``, to anything.
        mean (Sequence[float]): Mean of its images' channels red, green and blue, in [0, 1].
        std (Sequence[float]): Their standard deviation.
        watched (bool): Whether to take the outputs of the network's modules, the last one of each size, in place of
            what it returns. Defaults to False.
    """

    def __init__(self, net: nn.Module, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
                 watched: bool = False) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.register_buffer('mean', torch.tensor(mean).view(3, 1, 1))
        self.register_buffer('std', torch.tensor(std).view(3, 1, 1))
        self.watched = watched
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, 3, H, W) in [0, 1] to feature maps, from the largest to the smallest."""
        x = (images - self.mean) / self.std
        if not self.watched:
            maps = list(getattr(found := self.net(x), 'feature_maps', found))
        else:
            by_size: dict[tuple[int, ...], Tensor] = {}

            def keep(module: nn.Module, args: object, output: object) -> None:
                # Other layouts than (N, C, H, W), and maps that are not smaller than the image, are passed over.
                if isinstance(output, Tensor) and output.dim() == 4 and 1 < output.shape[2] < x.shape[2]:
                    by_size[tuple(output.shape[2:])] = output

            handles = [module.register_forward_hook(keep) for module in self.net.modules()]
            self.net(x)
            for handle in handles:
                handle.remove()
            maps = list(by_size.values())
        return sorted(maps, key=lambda feature: -feature.shape[2])


def build_teacher(name: str, weights: str | None = None) -> Teacher:
    """Build a teacher of another library.

    Args:
        name (str): ``timm:NAME``, ``torchvision:NAME``, or ``hf:PATH``, a folder or a repository that transformers'
            AutoBackbone loads.
        weights (str | None): File with weights of timm's or torchvision's model. None takes the library's own, which
            it downloads unless they are in its cache. Defaults to None.

    Raises:
        ValueError: If the library or the model is unknown, or the file does not fit.
    """
    library, _, model = name.partition(':')
    if library not in ('timm', 'torchvision', 'hf') or not model:
        raise ValueError(f'the teacher must be timm:NAME, torchvision:NAME or hf:PATH, got {name!r}')
    if weights is not None and not os.path.isfile(weights):
        raise ValueError(f'no such file of the teacher\'s weights: {weights}')
    if library == 'timm':
        import timm
        if ':' not in model and not timm.is_model(model.partition('.')[0]):
            raise ValueError(f'timm has no model {model!r}')
        options = dict(pretrained_cfg_overlay=dict(file=weights)) if weights else {}
        net = timm.create_model(model, pretrained=True, features_only=True, **options)
        return Teacher(net, net.pretrained_cfg['mean'], net.pretrained_cfg['std'])
    if library == 'torchvision':
        from torchvision.models import get_model
        net = get_model(model, weights=None if weights else 'DEFAULT')
        if weights:
            net.load_state_dict(torch.load(weights, map_location='cpu', weights_only=True))
        return Teacher(net, watched=True)
    if weights is not None:
        raise ValueError(f'the weights of hf:{model} are those of its folder, and {weights} was given too')
    from transformers import AutoBackbone, AutoConfig
    stages = AutoConfig.from_pretrained(model).stage_names
    return Teacher(AutoBackbone.from_pretrained(model, out_features=stages[1:]))


class Pair(NamedTuple):
    """A map of the teacher, and the student's stage that predicts it.

    Attributes:
        feature (int): Index of the teacher's map.
        stage (int): Index of the student's output.
        channels (int): Channels of the teacher's map.
    """

    feature: int
    stage: int
    channels: int


@MODELS.register_module()
class FeatureDistiller(BaseModel):
    """A backbone whose features, after a linear map, should be those of a teacher.

    Each stage of the backbone predicts the teacher's map of the nearest stride. The loss of a pair is 1 − the cosine of
    the predicted and the teacher's features, plus their smooth L1 distance; the teacher's features are normalised over
    their channels. Checkpoints leave the teacher out.

    Args:
        backbone (dict): Config of the student, whose outputs are those of all stages.
        teacher (str): See :func:`build_teacher`.
        teacher_weights (str | None): See :func:`build_teacher`. Defaults to None.
    """

    def __init__(self, backbone: dict, teacher: str, teacher_weights: str | None = None) -> None:
        super().__init__()
        self.backbone = MODELS.build(backbone)
        # In a tuple, it is no submodule: it is neither saved nor trained.
        self._teacher = (build_teacher(teacher, teacher_weights), )
        self.pairs = self._pair_up()
        self.projections = nn.ModuleList(
            nn.Conv2d(self.backbone.channels[pair.stage], pair.channels, 1) for pair in self.pairs)
        self.register_buffer('mean', torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def _pair_up(self) -> list[Pair]:
        size = 224
        maps = self._teacher[0](torch.zeros(1, 3, size, size))
        pairs: dict[int, Pair] = {}
        for i, feature in enumerate(maps):
            stride = size / feature.shape[2]
            stage = min(range(4), key=lambda j: abs(torch.tensor(stride / (4 * 2 ** j)).log().item()))
            if stride >= 3:
                pairs[stage] = Pair(i, stage, feature.shape[1])
        if not pairs:
            raise ValueError(f'the teacher has no feature map with a stride of 4 or more: it returns {len(maps)}')
        return list(pairs.values())

    def forward(self, inputs: Tensor | list[Tensor], data_samples: object = None, mode: str = 'loss',
                ) -> dict[str, Tensor]:
        """Return the losses of a batch, one for each pair.

        Args:
            inputs (Tensor | list[Tensor]): Images, uint8, (N, 3, H, W), red, green and blue.
            data_samples (object): Not used.
            mode (str): Only 'loss'.
        """
        if mode != 'loss':
            raise ValueError(f"mode must be 'loss', got {mode!r}")
        images = (torch.stack(inputs) if isinstance(inputs, list) else inputs).float() / 255
        expected = self._teacher[0].to(images.device)(images)
        outputs = self.backbone((images - self.mean) / self.std)
        losses = {}
        for pair, projection in zip(self.pairs, self.projections):
            target = expected[pair.feature].float()
            target = F.layer_norm(target.movedim(1, -1), target.shape[1:2]).movedim(-1, 1)
            found = F.interpolate(projection(outputs[pair.stage]), target.shape[2:], mode='bilinear',
                                  align_corners=False)
            losses[f'stage{pair.stage}.loss_cosine'] = 1 - F.cosine_similarity(found, target).mean()
            losses[f'stage{pair.stage}.loss_distance'] = F.smooth_l1_loss(found, target)
        return losses
