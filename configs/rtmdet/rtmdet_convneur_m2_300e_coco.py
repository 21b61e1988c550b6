_base_ = './rtmdet_convneur_m1_300e_coco.py'

model = dict(
    backbone=dict(arch='m2', init_cfg=dict(checkpoint={{_base_.pretrained.m2}})),
    neck=dict(in_channels=[96, 192, 384]))
