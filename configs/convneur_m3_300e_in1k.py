# ImageNet-1K, 300 epochs at 224 x 224, 8 GPUs x 256 images x 2 accumulated iterations = 4096 images an update:
#   tools/dist_train.sh configs/convneur_m3_300e_in1k.py 8
_base_ = [
    './_base_/models/convneur_classifier.py',
    './_base_/datasets/imagenet_224.py',
    './_base_/schedules/imagenet_300e.py',
    './_base_/mmpretrain_runtime.py',
]

model = dict(backbone=dict(arch='m3'), head=dict(in_channels=512))

# What a child config or --cfg-options may set as a variable, and what it is here; see
# convneur_mm/engine/settings.py.
runner_type = 'SettingsRunner'
default_hooks = dict(
    settings=dict(type='SettingsHook', classes=1000, data_root='data/imagenet', max_epochs=300, topk=(1, 5)))
