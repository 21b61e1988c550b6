_base_ = '../cascade_rcnn_convneur_m3_1x_coco.py'

model = dict(
    # As in mmdet's configs: the stem and the first stage stay as pretrained, and so do all batch statistics.
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=50,
        frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50')),
    neck=dict(in_channels=[256, 512, 1024, 2048]))
