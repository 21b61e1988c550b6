# mmseg reads DeiT's weights converted; once, in the folder that training starts in:
#   mmseg=$(.venv/bin/python -c 'import mmseg; print(mmseg.__path__[0])')
#   .venv/bin/python $mmseg/.mim/tools/model_converters/vit2mmseg.py \
#       https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth \
#       pretrain/deit_small_patch16_224-cd65a155.pth
_base_ = '../upernet_convneur_m3_80k_ade20k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionTransformer',
        img_size=(512, 512),
        embed_dims=384,
        num_layers=12,
        num_heads=6,
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        norm_cfg=dict(type='LN', eps=1e-6),
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/deit_small_patch16_224-cd65a155.pth')),
    # All blocks of a plain transformer are of stride 16: the neck makes the strides 4 to 32 that the head expects.
    neck=dict(type='MultiLevelNeck', in_channels=[384] * 4, out_channels=384, scales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[384] * 4),
    auxiliary_head=dict(in_channels=384))
