# Mask R-CNN, 8 GPUs x 2 images:
#   tools/dist_train.sh configs/overlock/mask_rcnn_overlock_t_3x_coco.py 8
_base_ = ['../_base_/models/mask_rcnn_overlock.py', './_base_/coco_3x.py']

model = dict(
    backbone=dict(
        arch='t', drop_path_rate=0.2, init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.t}})),
    neck=dict(in_channels=[64, 128, 384, 640]))
