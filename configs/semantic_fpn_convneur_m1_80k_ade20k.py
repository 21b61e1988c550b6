_base_ = './semantic_fpn_convneur_m3_80k_ade20k.py'

model = dict(
    backbone=dict(arch='m1', init_cfg=dict(checkpoint={{_base_.pretrained.m1}})),
    neck=dict(in_channels=[40, 80, 160, 320]))
