_base_ = './cascade_rcnn_resnet101_1x_coco.py'

model = dict(
    backbone=dict(
        type='ResNeXt', groups=32, base_width=4, init_cfg=dict(checkpoint='open-mmlab://resnext101_32x4d')))
