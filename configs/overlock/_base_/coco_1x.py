# COCO, 12 epochs, 1333 x 800, 8 GPUs x 2 images. The recipe of Swin with the learning rate of the authors' published
# config, 2e-4. Norms do not decay.
_base_ = [
    '../../_base_/models/overlock_pretrained.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='GroupingConstructor',
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))))

# What a child config or --cfg-options may set as a variable, such as classes = ('cat', 'dog'), and what it is here; see
# convneur_mm/engine/settings.py.
runner_type = 'SettingsRunner'
default_hooks = dict(
    settings=dict(
        type='SettingsHook', classes=80, data_root={{_base_.data_root}}, image_size=(1333, 800), max_epochs=12,
        milestones=[8, 11], pretrained={{_base_.pretrained}}, train_ann='annotations/instances_train2017.json',
        train_images='train2017/', val_ann='annotations/instances_val2017.json', val_images='val2017/'))
