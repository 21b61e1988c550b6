custom_imports = dict(imports=['convneur_mm'])

model = dict(
    type='ImageClassifier',
    # The backbone averages over the image before its last norm: no neck.
    backbone=dict(type='ConvNeur', out_indices=3, gap_before_final_norm=True),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0)),
    # One of the two for each batch, with even odds.
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))
