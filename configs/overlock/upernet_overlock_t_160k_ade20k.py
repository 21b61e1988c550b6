# UperNet, 160k iterations, crops of 512 x 512, 8 GPUs x 2 images:
#   tools/dist_train.sh configs/overlock/upernet_overlock_t_160k_ade20k.py 8
_base_ = [
    '../_base_/models/upernet_overlock.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_80k.py',
    '../_base_/mmseg_runtime.py',
]

model = dict(
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(
        arch='t', drop_path_rate=0.2, init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.t}})),
    decode_head=dict(in_channels=[64, 128, 384, 640]),
    auxiliary_head=dict(in_channels=384))

# Swin's recipe: no clipping, one learning rate for all parameters, and all but norms decay.
optim_wrapper = dict(
    clip_grad=None, paramwise_cfg=dict(_delete_=True, custom_keys=dict(norm=dict(decay_mult=0.0))))
max_iters, warmup_iters = 160000, 1500
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=warmup_iters),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=warmup_iters, end=max_iters),
]
train_cfg = dict(max_iters=max_iters)
train_dataloader = dict(batch_size=2)

# What a child config or --cfg-options may set as a variable, and what it is here; see
# convneur_mm/engine/settings.py.
runner_type = 'SettingsRunner'
default_hooks = dict(
    settings=dict(
        classes=150, data_root={{_base_.data_root}}, max_iters=max_iters, pretrained={{_base_.pretrained}},
        train_images='images/training', train_labels='annotations/training', val_images='images/validation',
        val_labels='annotations/validation'))
