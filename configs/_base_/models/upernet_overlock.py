_base_ = './upernet_convneur.py'
custom_imports = dict(imports=['convneur_mm'])

# As in overlock_pretrained.py, which cannot stand beside the base's own.
pretrained = dict(_delete_=True, **{
    arch: f'https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_{arch}_in1k_224.pth'
    for arch in ('xt', 't', 's', 'b')
})
# All BatchNorms see the images of all GPUs.
sync_bn = 'torch'
model = dict(backbone=dict(_delete_=True, type='OverLoCK'))
