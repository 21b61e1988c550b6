_base_ = './cascade_rcnn_overlock_t_3x_coco.py'

model = dict(
    backbone=dict(arch='s', drop_path_rate=0.4, init_cfg=dict(checkpoint={{_base_.pretrained.s}})),
    neck=dict(in_channels=[64, 128, 448, 640]))
