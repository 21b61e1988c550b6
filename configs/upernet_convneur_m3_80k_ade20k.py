# UperNet, 80k iterations, crops of 512 x 512, 4 GPUs x 4 images:
#   tools/dist_train.sh configs/upernet_convneur_m3_80k_ade20k.py 4
_base_ = [
    './_base_/models/upernet_convneur.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_80k.py',
    './_base_/mmseg_runtime.py',
]

model = dict(
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(arch='m3', init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.m3}})),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))
