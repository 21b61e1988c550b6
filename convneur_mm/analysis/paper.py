"""Figures of the ConvNeur and OverLoCK papers, by shipped config. None of them is a result of ours.

Wherever a tool prints one it says that it is the paper's.
"""
from __future__ import annotations

from typing import NamedTuple


class Classifier(NamedTuple):
    """Row of Table 2: M parameters, G FLOPs at 224 × 224, and top-1 accuracy on ImageNet-1K."""

    params_m: float
    gflops: float
    top1: float


IMAGENET = dict(m1=Classifier(4.3, 0.71, 75.4), m2=Classifier(6.1, 1.01, 77.6), m3=Classifier(10.6, 1.77, 80.0),
                m4=Classifier(18.1, 3.06, 81.5))

# M parameters and G FLOPs of OverLoCK's paper, merged, without the sums of ContMix.
OVERLOCK = dict(xt=(16, 2.6), t=(33, 5.5), s=(56, 9.7), b=(95, 16.7))


class AblationRow(NamedTuple):
    """Row of Table 5: what is varied, the variant, our config of it, and the paper's G FLOPs and top-1 accuracy."""

    experiment: str
    variant: str
    config: str
    paper_gflops: float
    paper_top1: float


DEFAULT = 'convneur_m3_300e_in1k'
SELF_ATTENTION = 'ablation/convneur_m3_branch_self_attention_300e_in1k'
ABLATION = (
    AblationRow('global memory', 'local only', 'ablation/convneur_m3_placement_none_300e_in1k', 1.4, 78.2),
    AblationRow('global memory', 'per stage (default)', DEFAULT, 1.8, 80.0),
    AblationRow('global memory', 'per block', 'ablation/convneur_m3_placement_block_300e_in1k', 2.3, 80.4),
    AblationRow('branch', 'CBAM', 'ablation/convneur_m3_branch_cbam_300e_in1k', 1.5, 78.4),
    AblationRow('branch', 'non-local', 'ablation/convneur_m3_branch_non_local_300e_in1k', 3.0, 79.1),
    AblationRow('branch', 'self-attention', SELF_ATTENTION, 1.8, 79.8),
    AblationRow('branch', 'IR-RWKV', 'ablation/convneur_m3_branch_rwkv_300e_in1k', 2.0, 77.6),
    AblationRow('branch', 'Titans', 'ablation/convneur_m3_branch_titans_300e_in1k', 3.1, 79.6),
    AblationRow('branch', 'neural memory (default)', DEFAULT, 1.8, 80.0),
    AblationRow('fusion', 'addition', 'ablation/convneur_m3_fusion_add_300e_in1k', 1.8, 79.6),
    AblationRow('fusion', 'concatenation', 'ablation/convneur_m3_fusion_concat_300e_in1k', 1.9, 79.5),
    AblationRow('fusion', 'gate (default)', DEFAULT, 1.8, 80.0),
    AblationRow('memory channels', '64', 'ablation/convneur_m3_mem_channels_64_300e_in1k', 1.5, 78.6),
    AblationRow('memory channels', '128 (default)', DEFAULT, 1.8, 80.0),
    AblationRow('memory channels', '256', 'ablation/convneur_m3_mem_channels_256_300e_in1k', 2.7, 80.3),
)


class DenseRow(NamedTuple):
    """Row of Table 3 or 4: head, backbone, our config of it, and the paper's G FLOPs and results, if it has them."""

    head: str
    backbone: str
    config: str
    paper_gflops: int | None = None
    paper_results: tuple[float, ...] = ()


def _detector(backbone: str, name: str, *paper_results: float) -> DenseRow:
    return DenseRow('Cascade Mask R-CNN', backbone, name.format('cascade_rcnn', '1x_coco'), None, paper_results)


def _segmentor(head: str, backbone: str, name: str, paper_gflops: int | None = None,
               *paper_results: float) -> DenseRow:
    prefix = {'Semantic FPN': 'semantic_fpn', 'UperNet': 'upernet'}[head]
    return DenseRow(head, backbone, name.format(prefix, '80k_ade20k'), paper_gflops, paper_results)


# What ``paper_results`` are, by head.
RESULTS = {'Cascade Mask R-CNN': ('box AP', 'mask AP'), 'Semantic FPN': ('mIoU', ), 'UperNet': ('mIoU', )}
DENSE = (
    _detector('ConvNeur-m1', '{}_convneur_m1_{}'),
    _detector('ConvNeur-m2', '{}_convneur_m2_{}', 41.2, 36.4),
    _detector('ConvNeur-m3', '{}_convneur_m3_{}', 42.4, 39.0),
    _detector('ConvNeur-m4', '{}_convneur_m4_{}'),
    _detector('ResNet-50', 'baselines/{}_resnet50_{}', 38.0, 34.4),
    _detector('PVT-T', 'baselines/{}_pvt_t_{}', 36.7, 35.1),
    _detector('PVTv2-B0', 'baselines/{}_pvtv2_b0_{}', 38.2, 36.2),
    _detector('ResNet-101', 'baselines/{}_resnet101_{}', 40.4, 36.4),
    _detector('ResNeXt-101-32x4d', 'baselines/{}_resnext101_32x4d_{}', 41.9, 37.5),
    _detector('PVT-S', 'baselines/{}_pvt_s_{}', 40.4, 37.8),
    _detector('PVTv2-B1', 'baselines/{}_pvtv2_b1_{}', 41.8, 38.8),
    _segmentor('Semantic FPN', 'ConvNeur-m1', '{}_convneur_m1_{}'),
    _segmentor('Semantic FPN', 'ConvNeur-m2', '{}_convneur_m2_{}', 106, 39.17),
    _segmentor('Semantic FPN', 'ConvNeur-m3', '{}_convneur_m3_{}', 123, 41.42),
    _segmentor('Semantic FPN', 'ConvNeur-m4', '{}_convneur_m4_{}'),
    _segmentor('Semantic FPN', 'ResNet-50', 'baselines/{}_resnet50_{}', 183, 36.59),
    _segmentor('Semantic FPN', 'PVT-T', 'baselines/{}_pvt_t_{}', 158, 36.57),
    _segmentor('UperNet', 'ConvNeur-m1', '{}_convneur_m1_{}'),
    _segmentor('UperNet', 'ConvNeur-m2', '{}_convneur_m2_{}'),
    _segmentor('UperNet', 'ConvNeur-m3', '{}_convneur_m3_{}'),
    _segmentor('UperNet', 'ConvNeur-m4', '{}_convneur_m4_{}', 908, 45.72),
    _segmentor('UperNet', 'ResNet-50', 'baselines/{}_resnet50_{}', 953, 42.10),
    _segmentor('UperNet', 'DeiT-S', 'baselines/{}_deit_s_{}', 1217, 43.92),
    _segmentor('UperNet', 'Swin-T', 'baselines/{}_swin_t_{}', 945, 44.51),
)


class Cost(NamedTuple):
    """A paper's figures for a config: M parameters, G FLOPs, and any difference between its count and ours."""

    params_m: float | None
    gflops: float
    note: str = ''


def _costs() -> dict[str, Cost]:
    costs = {f'convneur_{arch}_300e_in1k': Cost(row.params_m, row.gflops) for arch, row in IMAGENET.items()}
    costs |= {f'overlock/overlock_{arch}_300e_in1k': Cost(
        *figures, 'OverLoCK\'s paper, merged, without the sums of ContMix') for arch, figures in OVERLOCK.items()}
    for row in ABLATION:
        note = 'without the products with the attention matrix' if row.config == SELF_ATTENTION else ''
        costs.setdefault(row.config, Cost(None, row.paper_gflops, note))
    for row in DENSE:
        if row.paper_gflops is not None:
            note = '' if 'convneur' in row.config else 'norms, pooling and upsampling included'
            costs[row.config] = Cost(None, row.paper_gflops, note)
    return costs


# By name of the shipped config, at its size in :data:`.flops.SHAPES`.
COSTS = _costs()
