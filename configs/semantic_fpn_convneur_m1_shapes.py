# A light Semantic FPN for small pictures, trained from nothing on 1200 generated ones, 2 processes x 4 images:
#   tools/make_shapes.py data/shapes_ade20k --format ade20k --num-train 1200
#   tools/dist_train.sh configs/semantic_fpn_convneur_m1_shapes.py 2
#
# For data of your own, pictures and label maps of equal names, a child config sets what differs of the following and
# nothing else. Label i of a map is the i-th class, from 0 on; 255 is no class. Other classes start without palette and
# class_weight.
_base_ = './semantic_fpn_convneur_m1_80k_ade20k.py'

data_root = 'data/shapes_ade20k/'
train_images, train_labels = 'images/training', 'annotations/training'
val_images, val_labels = 'images/validation', 'annotations/validation'
img_suffix, seg_map_suffix = '.jpg', '.png'
# Label 0, "other" in ADE20K's form, is a class here: the background is to be told from the shapes too.
classes = ('background', 'disk', 'square', 'triangle', 'star', 'ring', 'cross')
palette = [[90, 90, 90], [230, 60, 60], [60, 180, 75], [255, 225, 25], [67, 99, 216], [245, 130, 49], [145, 30, 180]]
# Six of seven pixels are background; unweighted, the first hundreds of iterations learn nothing else.
class_weight = [0.4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
# Width and height; pictures of another shape are fitted in.
image_size = (96, 96)
max_iters = 1850
pretrained = dict(m1=None)

model = dict(
    data_preprocessor=dict(size=image_size[::-1]),
    # Not the paper's memory: four chunks whatever the size of a picture, a normalised step, and reads after the last
    # write are stable at every size, and do not depend on the order of the chunks.
    backbone=dict(
        memory_cfg=dict(num_chunks=4, step_normalization=0.125, retrieve='final'),
        init_cfg=dict(checkpoint=pretrained['m1'])),
    neck=dict(out_channels=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64], channels=64, num_classes=len(classes),
        loss_decode=dict(class_weight=class_weight)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=image_size, keep_ratio=True)],
            [dict(type='Resize', scale_factor=factor, keep_ratio=True) for factor in (0.75, 1.0, 1.25)],
            [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ]),
]
dataset = dict(
    type='BaseSegDataset', data_root=data_root, metainfo=dict(classes=classes, palette=palette),
    img_suffix=img_suffix, seg_map_suffix=seg_map_suffix)
train_dataloader = dict(
    batch_size=4, num_workers=1,
    dataset=dict(_delete_=True, **dataset, pipeline=train_pipeline,
                 data_prefix=dict(img_path=train_images, seg_map_path=train_labels)))
val_dataloader = dict(
    batch_size=4, num_workers=1,
    dataset=dict(_delete_=True, **dataset, pipeline=test_pipeline,
                 data_prefix=dict(img_path=val_images, seg_map_path=val_labels)))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=max_iters, val_interval=925)
# Nothing is pretrained, so neck and head learn no faster than the backbone.
optim_wrapper = dict(
    optimizer=dict(lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={'neck.': dict(lr_mult=1.0), '_head.': dict(lr_mult=1.0)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=max_iters),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=925, save_best=None, max_keep_ckpts=1),
    settings=dict(
        classes=classes, class_weight=class_weight, data_root=data_root, image_size=image_size, img_suffix=img_suffix,
        max_iters=max_iters, palette=palette, pretrained=pretrained, seg_map_suffix=seg_map_suffix,
        train_images=train_images, train_labels=train_labels, val_images=val_images, val_labels=val_labels))
auto_scale_lr = dict(base_batch_size=8)
randomness = dict(seed=0)
