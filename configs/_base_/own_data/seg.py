# What tools/train_custom.py starts from for label maps: the light Semantic FPN, with lists of the pictures of each
# split, and pictures resized at random, cropped, mirrored and changed in colour, since there are often few.
_base_ = '../../semantic_fpn_convneur_m1_shapes.py'

train_ann, val_ann = 'train.txt', 'val.txt'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale={{_base_.image_size}}, ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size={{_base_.image_size}}),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(ann_file=train_ann, pipeline=train_pipeline))
# One picture each: mmseg tests no batch of several shapes.
val_dataloader = dict(batch_size=1, dataset=dict(ann_file=val_ann))
test_dataloader = val_dataloader

# Both from the start: a short training may end within the warm-up.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end={{_base_.max_iters}}),
]
default_hooks = dict(settings=dict(train_ann=train_ann, val_ann=val_ann))
