# Cascade Mask R-CNN, 12 epochs, 1333 x 800, 4 GPUs x 2 images:
#   tools/dist_train.sh configs/cascade_rcnn_convneur_m3_1x_coco.py 4
_base_ = [
    './_base_/models/cascade_mask_rcnn_convneur.py',
    'mmdet::_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(arch='m3', init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.m3}})),
    neck=dict(in_channels=[64, 128, 256, 512]))
