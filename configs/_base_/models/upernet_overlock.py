_base_ = ['./upernet_convneur.py', './overlock_pretrained.py']
custom_imports = dict(imports=['convneur_mm', 'convneur_mm.visualization.segmentation'])

# All BatchNorms see the images of all GPUs.
sync_bn = 'torch'
model = dict(backbone=dict(_delete_=True, type='OverLoCK'))
