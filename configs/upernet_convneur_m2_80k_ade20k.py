_base_ = './upernet_convneur_m3_80k_ade20k.py'

model = dict(
    backbone=dict(arch='m2', init_cfg=dict(checkpoint={{_base_.pretrained.m2}})),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192))
