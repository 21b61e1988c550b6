# A light Cascade Mask R-CNN for small pictures, trained from nothing on 1000 generated ones, 2 processes x 4 images:
#   tools/make_shapes.py data/shapes --num-train 1000
#   tools/dist_train.sh configs/cascade_rcnn_convneur_m1_shapes.py 2
#
# For data of your own in COCO's form, a child config sets what differs of the following (the class names in the order
# of the annotation file's categories) and nothing else:
_base_ = './cascade_rcnn_convneur_m1_1x_coco.py'

data_root = 'data/shapes/'
train_ann, train_images = 'annotations/instances_train.json', 'train/'
val_ann, val_images = 'annotations/instances_val.json', 'val/'
classes = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')
# Width and height; pictures of another shape are fitted in.
image_size = (160, 160)
max_epochs = 4
pretrained = dict(m1=None)

ious = (0.5, 0.6, 0.7)
stds = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])

model = dict(
    # Not the paper's memory: four chunks whatever the size of a picture, a normalised step, and reads after the last
    # write are stable at every size, and do not depend on the order of the chunks.
    backbone=dict(
        memory_cfg=dict(num_chunks=4, inner_step=1.0, step_normalization=0.125, retrieve='final'),
        init_cfg=dict(checkpoint=pretrained['m1'])),
    neck=dict(out_channels=64, num_outs=4),
    rpn_head=dict(
        in_channels=64, feat_channels=64, anchor_generator=dict(scales=[5], strides=[4, 8, 16, 32])),
    roi_head=dict(
        # One sample a bin, which is hardly larger than a pixel here: with four, RoIAlign takes a third of a step.
        bbox_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=1)),
        bbox_head=[
            dict(
                type='Shared2FCBBoxHead',
                in_channels=64,
                fc_out_channels=128,
                roi_feat_size=7,
                num_classes=len(classes),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=std),
                reg_class_agnostic=True,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0)) for std in stds
        ],
        mask_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=1)),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=len(classes))),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=[
            dict(
                assigner=dict(
                    type='MaxIoUAssigner', pos_iou_thr=iou, neg_iou_thr=iou, min_pos_iou=iou,
                    match_low_quality=False, ignore_iof_thr=-1),
                sampler=dict(
                    type='RandomSampler', num=32, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
                mask_size=28,
                pos_weight=-1,
                debug=False) for iou in ious
        ]),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
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

train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, T_max=max_epochs, eta_min=1e-5,
         convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(max_keep_ckpts=1),
    settings=dict(
        classes=classes, data_root=data_root, image_size=image_size, max_epochs=max_epochs, pretrained=pretrained,
        train_ann=train_ann, train_images=train_images, val_ann=val_ann, val_images=val_images))
auto_scale_lr = dict(base_batch_size=8)
randomness = dict(seed=0)
