_base_ = './overlock_t_300e_in1k.py'

model = dict(backbone=dict(arch='b', drop_path_rate=0.5), head=dict(in_channels=720, overview_channels=576))

# The centre is 0.975 of the resized picture.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=229, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
