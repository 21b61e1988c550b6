# ConvNeur-m1 as a classifier of small pictures, trained from nothing on 4000 generated ones, 2 processes x 16 images:
#   tools/make_shapes.py data/shapes_imagenet --format imagenet --num-train 4000
#   tools/dist_train.sh configs/convneur_m1_shapes.py 2
#
# For data of your own, a folder of pictures for each class in a folder for training and one for validation, a child
# config sets what differs of the following and nothing else.
_base_ = './convneur_m1_300e_in1k.py'

data_root = 'data/shapes_imagenet'
train_images, val_images = 'train', 'val'
# In alphabetical order, as mmpretrain numbers class folders.
classes = ('cross', 'disk', 'ring', 'square', 'star', 'triangle')
# Width and height, to which pictures are stretched.
image_size = (64, 64)
max_epochs = 8
pretrained = dict(m1=None)

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=pretrained['m1'])),
    head=dict(num_classes=len(classes), topk=(1, ), loss=dict(label_smooth_val=0.0)),
    # Mixed pictures ask for longer training.
    train_cfg=None)
data_preprocessor = dict(num_classes=len(classes))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size),
    dict(type='PackInputs'),
]
dataset = dict(type='CustomDataset', data_root=data_root, with_label=True, classes=classes)
train_dataloader = dict(
    batch_size=16, num_workers=1,
    dataset=dict(_delete_=True, **dataset, data_prefix=train_images, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=16, num_workers=1,
    dataset=dict(_delete_=True, **dataset, data_prefix=val_images, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, ))
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs, val_interval=2)
# The recipe clips nothing; at this small batch, now and then a gradient would undo the training.
optim_wrapper = dict(optimizer=dict(lr=1.5e-3), accumulative_counts=1, clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=2, max_keep_ckpts=1, save_best=None),
    settings=dict(
        classes=classes, data_root=data_root, image_size=image_size, max_epochs=max_epochs, pretrained=pretrained,
        topk=(1, ), train_images=train_images, val_images=val_images))
auto_scale_lr = dict(base_batch_size=32)
randomness = dict(seed=0)
