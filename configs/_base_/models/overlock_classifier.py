_base_ = './convneur_classifier.py'
# The head subclasses mmpretrain's and is not imported with the package.
custom_imports = dict(imports=['convneur_mm', 'convneur_mm.models.overlock.head'])

# All BatchNorms see the images of all GPUs.
sync_bn = 'torch'
model = dict(
    backbone=dict(_delete_=True, type='OverLoCK', out_indices=3, for_classifier=True),
    head=dict(
        _delete_=True,
        type='OverLoCKClsHead',
        num_classes=1000,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Conv2d', std=0.02, bias=0.0)))
