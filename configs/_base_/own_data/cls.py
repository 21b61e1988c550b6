# What tools/train_custom.py starts from for class folders: the light classifier, with lists of the pictures of each
# split, and pictures cropped, mirrored and changed in colour, since there are often few.
_base_ = '../../convneur_m1_shapes.py'

train_ann, val_ann = 'train.txt', 'val.txt'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale={{_base_.image_size}}, crop_ratio_range=(0.5, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='ColorJitter', brightness=0.3, contrast=0.3, saturation=0.3),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(ann_file=train_ann, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(ann_file=val_ann))
test_dataloader = val_dataloader
default_hooks = dict(settings=dict(train_ann=train_ann, val_ann=val_ann))
