# Fine-tuning, not the paper's recipe: for a backbone whose local branch and head start from a converted ConvNeXt or
# ConvNeXt-V2 (docs/weights.md), and whose memory is new. 8 GPUs x 256 images x 2 accumulated iterations:
#   tools/dist_train.sh configs/finetune/convneur_m3_finetune_30e_in1k.py 8 --cfg-options load_from=converted.pth
_base_ = '../convneur_m3_300e_in1k.py'

max_epochs = 30
model = dict(backbone=dict(drop_path_rate=0.1))
optim_wrapper = dict(
    optimizer=dict(lr=8e-4),
    paramwise_cfg=dict(
        layer_decay_rate=0.9,
        custom_keys={
            # Nothing in the global branch is trained yet. Longer keys go first, and M_0 must not decay.
            '.global_branch.': dict(lr_mult=5.0),
            '.global_branch.memory.w1': dict(lr_mult=5.0, decay_mult=0.0),
            '.global_branch.memory.w2': dict(lr_mult=5.0, decay_mult=0.0),
        }))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=2, end=max_epochs, convert_to_iter_based=True),
]
custom_hooks = [dict(type='EMAHook', momentum=1e-4)]
