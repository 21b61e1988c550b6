# AdamW, lr 6e-5 for 4 GPUs x 4 images and ten times that for neck and heads, 1500 linear warm-up iterations, then
# polynomial decay to zero at 80k. The paper names no power: 1, as in mmseg's AdamW configs.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    clip_grad=dict(max_norm=1.0),
    # Norms, biases and the scales of GRN do not decay, in neck and heads either, whatever their learning rate.
    constructor='GroupingConstructor',
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={
            # Nor does M_0: it is the state every image starts from, no projection, and decay would only shrink it
            # towards the empty memory.
            '.memory.w1': dict(decay_mult=0.0),
            '.memory.w2': dict(decay_mult=0.0),
            'neck.': dict(lr_mult=10.0),
            '_head.': dict(lr_mult=10.0),
        }))

max_iters = 80000
warmup_iters = 1500
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=warmup_iters),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=warmup_iters, end=max_iters),
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=8000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=8000, save_best='mIoU'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
    settings=dict(type='SettingsHook', max_iters=max_iters))
auto_scale_lr = dict(base_batch_size=16)
