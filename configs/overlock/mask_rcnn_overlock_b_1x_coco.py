_base_ = './mask_rcnn_overlock_t_1x_coco.py'

model = dict(
    backbone=dict(arch='b', drop_path_rate=0.5, init_cfg=dict(checkpoint={{_base_.pretrained.b}})),
    neck=dict(in_channels=[80, 160, 528, 720]))
