_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py', '../pretrained.py']
custom_imports = dict(imports=['convneur_mm'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvNeur',
        # The paper's memory settings for COCO; the defaults, 196 and 1.0, serve everywhere else.
        memory_cfg=dict(chunk_size=4096, inner_step=1e-3)))
