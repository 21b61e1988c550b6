_base_ = './rtmdet-ins_convneur_m1_300e_coco.py'

# Neck and head as wide and deep as those of RTMDet-m.
model = dict(
    backbone=dict(arch='m4', init_cfg=dict(checkpoint={{_base_.pretrained.m4}})),
    neck=dict(in_channels=[160, 320, 640], out_channels=192, num_csp_blocks=2),
    bbox_head=dict(in_channels=192, feat_channels=192))
