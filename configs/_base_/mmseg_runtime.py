# What mmseg's default_runtime.py sets: `_base_ = 'mmseg::…'` does not resolve with the maintained forks.
default_scope = 'mmseg'

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
# mmseg's own takes a second a picture to place the names of the classes.
visualizer = dict(type='SegmentationVisualizer', name='visualizer', vis_backends=[dict(type='LocalVisBackend')])
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
