# A light RTMDet-Ins for small pictures, trained from nothing on 1000 generated ones, 2 processes x 4 images:
#   tools/make_shapes.py data/shapes --num-train 1000
#   tools/dist_train.sh configs/rtmdet/rtmdet-ins_convneur_m1_shapes.py 2
#
# For data of your own in COCO's form, a child config sets what differs of the following (the class names in the order
# of the annotation file's categories) and nothing else:
_base_ = './rtmdet-ins_convneur_m1_300e_coco.py'

runner_type = 'SettingsRunner'
data_root = 'data/shapes/'
train_ann, train_images = 'annotations/instances_train.json', 'train/'
val_ann, val_images = 'annotations/instances_val.json', 'val/'
classes = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')
# Width and height; pictures of another shape are fitted in.
image_size = (160, 160)
max_epochs, switch_epoch = 8, 4
pretrained = dict(m1=None)

model = dict(
    backbone=dict(init_cfg=dict(checkpoint=pretrained['m1'])),
    neck=dict(out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64, num_classes=len(classes)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
    dict(type='CachedMosaic', img_scale=image_size, pad_val=114.0, max_cached_images=20, random_pop=False),
    # Half to twice the mosaic's size, whose sides are twice the image's.
    dict(type='RandomResize', scale=image_size, ratio_range=(1.0, 4.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=image_size, recompute_bbox=True, allow_negative_crop=True),
    dict(type='YOLOXHSVRandomAug'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='Pad', size=image_size, pad_val=dict(img=(114, 114, 114))),
    dict(type='CachedMixUp', img_scale=image_size, ratio_range=(1.0, 1.0), max_cached_images=10, random_pop=False,
         pad_val=(114, 114, 114), prob=0.25),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)),
    dict(type='PackDetInputs'),
]
# From switch_epoch on: single pictures, as in the test.
train_pipeline_stage2 = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=image_size, recompute_bbox=True, allow_negative_crop=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)),
    dict(type='YOLOXHSVRandomAug'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='Pad', size=image_size, pad_val=dict(img=(114, 114, 114))),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='Pad', size=image_size, pad_val=dict(img=(114, 114, 114))),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        data_root=data_root, ann_file=train_ann, data_prefix=dict(img=train_images),
        metainfo=dict(classes=classes), filter_cfg=dict(filter_empty_gt=True, min_size=0), pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        data_root=data_root, ann_file=val_ann, data_prefix=dict(img=val_images), metainfo=dict(classes=classes),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val_ann)
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs, val_interval=2, dynamic_intervals=None)
optim_wrapper = dict(optimizer=dict(lr=4e-3), clip_grad=dict(max_norm=10.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, T_max=max_epochs, eta_min=1e-5,
         convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=2, max_keep_ckpts=1),
    settings=dict(
        type='SettingsHook', classes=classes, data_root=data_root, image_size=image_size, max_epochs=max_epochs,
        pretrained=pretrained, switch_epoch=switch_epoch, train_ann=train_ann, train_images=train_images,
        val_ann=val_ann, val_images=val_images))
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0002, update_buffers=True, priority=49),
    dict(type='PipelineSwitchHook', switch_epoch=switch_epoch, switch_pipeline=train_pipeline_stage2),
]
auto_scale_lr = dict(base_batch_size=8)
randomness = dict(seed=0)
