# What tools/train_custom.py --head cascade starts from for instance masks: the light Cascade Mask R-CNN, with pictures
# cropped, mirrored and changed in colour, since there are often few. Crops are cut before pictures are resized: objects
# grow.
_base_ = '../../cascade_rcnn_convneur_m1_shapes.py'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomCrop', crop_type='relative_range', crop_size=(0.6, 0.6)),
    dict(type='Resize', scale={{_base_.image_size}}, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
