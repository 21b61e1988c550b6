_base_ = './upernet_convneur_m3_80k_ade20k.py'

model = dict(
    backbone=dict(arch='m1', init_cfg=dict(checkpoint={{_base_.pretrained.m1}})),
    decode_head=dict(in_channels=[40, 80, 160, 320]),
    auxiliary_head=dict(in_channels=160))
