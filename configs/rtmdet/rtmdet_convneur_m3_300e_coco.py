_base_ = './rtmdet_convneur_m1_300e_coco.py'

# Neck and head as wide as those of RTMDet-s.
model = dict(
    backbone=dict(arch='m3', init_cfg=dict(checkpoint={{_base_.pretrained.m3}})),
    neck=dict(in_channels=[128, 256, 512], out_channels=128),
    bbox_head=dict(in_channels=128, feat_channels=128))
