# UperNet, 80k iterations, crops of 512 x 512, 4 GPUs x 4 images:
#   tools/dist_train.sh configs/upernet_convneur_m3_80k_ade20k.py 4
_base_ = [
    './_base_/models/upernet_convneur.py',
    './_base_/pretrained.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_80k.py',
    './_base_/mmseg_runtime.py',
]

model = dict(
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(arch='m3', init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.m3}})),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))

# What a child config or --cfg-options may set as a variable, and what it is here; see
# convneur_mm/engine/settings.py.
runner_type = 'SettingsRunner'
default_hooks = dict(
    settings=dict(
        classes=150, data_root={{_base_.data_root}}, pretrained={{_base_.pretrained}}, train_images='images/training',
        train_labels='annotations/training', val_images='images/validation', val_labels='annotations/validation'))
