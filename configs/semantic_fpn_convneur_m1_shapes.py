# A light Semantic FPN for small pictures, trained from nothing on 1200 generated ones, 2 processes x 4 images:
#   tools/make_shapes.py data/shapes_ade20k --format ade20k --num-train 1200
#   tools/dist_train.sh configs/semantic_fpn_convneur_m1_shapes.py 2
_base_ = './semantic_fpn_convneur_m1_80k_ade20k.py'

# Label 0, "other" in ADE20K's form, is a class here: the background is to be told from the shapes too.
classes = ('background', 'disk', 'square', 'triangle', 'star', 'ring', 'cross')
palette = [[90, 90, 90], [230, 60, 60], [60, 180, 75], [255, 225, 25], [67, 99, 216], [245, 130, 49], [145, 30, 180]]

model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(init_cfg=None),
    neck=dict(out_channels=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64], channels=64, num_classes=len(classes),
        # Six of seven pixels are background; unweighted, the first hundreds of iterations learn nothing else.
        loss_decode=dict(class_weight=[0.4] + [1.0] * (len(classes) - 1))))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset', data_root='data/shapes_ade20k/', metainfo=dict(classes=classes, palette=palette),
    img_suffix='.jpg', seg_map_suffix='.png')
train_dataloader = dict(
    batch_size=4, num_workers=1,
    dataset=dict(_delete_=True, **dataset, pipeline=train_pipeline,
                 data_prefix=dict(img_path='images/training', seg_map_path='annotations/training')))
val_dataloader = dict(
    batch_size=4, num_workers=1,
    dataset=dict(_delete_=True, **dataset, pipeline=test_pipeline,
                 data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation')))
test_dataloader = val_dataloader

max_iters = 1850
train_cfg = dict(max_iters=max_iters, val_interval=925)
# Nothing is pretrained, so neck and head learn no faster than the backbone.
optim_wrapper = dict(
    optimizer=dict(lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        _delete_=True, flat_decay_mult=0.0,
        custom_keys={'.memory.w1': dict(decay_mult=0.0), '.memory.w2': dict(decay_mult=0.0)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=max_iters),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=925, save_best=None, max_keep_ckpts=1))
auto_scale_lr = dict(base_batch_size=8)
randomness = dict(seed=0)
