_base_ = './semantic_fpn_convneur_m3_80k_ade20k.py'

model = dict(
    backbone=dict(arch='m2', init_cfg=dict(checkpoint={{_base_.pretrained.m2}})),
    neck=dict(in_channels=[48, 96, 192, 384]))
