# RTMDet, a light one-stage detector, 300 epochs at 640 x 640, 8 GPUs x 32 images: mmdet's recipe of the tiny model,
# with ConvNeur as its backbone.
#   tools/dist_train.sh configs/rtmdet/rtmdet_convneur_m1_300e_coco.py 8
_base_ = ['mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', '../_base_/pretrained.py']
custom_imports = dict(imports=['convneur_mm'])

model = dict(
    # The colours and scale of the backbone's weights, where RTMDet's own are trained on BGR.
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        type='ConvNeur',
        arch='m1',
        out_indices=(1, 2, 3),
        # Not the paper's: stable at every size of a picture.
        memory_cfg=dict(num_chunks=4, inner_step=1.0, step_normalization=0.125, retrieve='final'),
        init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.m1}})),
    neck=dict(in_channels=[80, 160, 320]))
optim_wrapper = dict(
    constructor='GroupingConstructor',
    paramwise_cfg=dict(
        _delete_=True,
        bypass_duplicate=True,
        flat_decay_mult=0.0,
        custom_keys={
            # M_0 is the state every image starts from, no projection.
            '.memory.w1': dict(decay_mult=0.0),
            '.memory.w2': dict(decay_mult=0.0),
        }))
