_base_ = './semantic_fpn_convneur_m3_80k_ade20k.py'

model = dict(
    backbone=dict(arch='m4', init_cfg=dict(checkpoint={{_base_.pretrained.m4}})),
    neck=dict(in_channels=[80, 160, 320, 640]))
