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

# What a child config or --cfg-options may set as a variable, such as classes = ('cat', 'dog'), and what it is here; see
# convneur_mm/engine/settings.py.
runner_type = 'SettingsRunner'
default_hooks = dict(
    settings=dict(
        type='SettingsHook', classes=80, data_root={{_base_.data_root}}, image_size=(1333, 800), max_epochs=12,
        milestones=[8, 11], pretrained={{_base_.pretrained}}, train_ann='annotations/instances_train2017.json',
        train_images='train2017/', val_ann='annotations/instances_val2017.json', val_images='val2017/'))
