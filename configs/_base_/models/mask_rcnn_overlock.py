_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
custom_imports = dict(imports=['convneur_mm'])

# All BatchNorms see the images of all GPUs.
sync_bn = 'torch'
model = dict(backbone=dict(_delete_=True, type='OverLoCK', add_overview=True))
