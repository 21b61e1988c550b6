# ImageNet-1K, 300 epochs at 224 x 224, 8 GPUs x 256 images, in mixed precision as its authors train:
#   tools/dist_train.sh configs/overlock/overlock_t_300e_in1k.py 8 --amp
_base_ = [
    '../_base_/models/overlock_classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/mmpretrain_runtime.py',
]

model = dict(backbone=dict(arch='t', drop_path_rate=0.15), head=dict(in_channels=640, overview_channels=512))

# The centre is 0.95 of the resized picture.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=235, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# Scales and tables of more than one axis decay, norms and biases do not.
optim_wrapper = dict(
    optimizer=dict(lr=2e-3), accumulative_counts=1, clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(_delete_=True, flat_decay_mult=0.0))
max_epochs, warmup_epochs = 300, 5
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / 2e-3, by_epoch=True, begin=0, end=warmup_epochs,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=warmup_epochs, end=max_epochs,
         convert_to_iter_based=True),
]
custom_hooks = [dict(type='EMAHook', momentum=1e-4, update_buffers=True)]

# What a child config or --cfg-options may set as a variable, and what it is here; see
# convneur_mm/engine/settings.py.
runner_type = 'SettingsRunner'
default_hooks = dict(
    settings=dict(type='SettingsHook', classes=1000, data_root='data/imagenet', max_epochs=300, topk=(1, 5)))
