# Fine-tuning, not the paper's recipe: for a backbone whose local branch starts from a converted ConvNeXt or ConvNeXt-V2
# (docs/weights.md), and whose memory is new.
#   tools/dist_train.sh configs/finetune/upernet_convneur_m3_finetune_80k_ade20k.py 4 \
#       --cfg-options pretrained.m3=converted.pth
_base_ = '../upernet_convneur_m3_80k_ade20k.py'

model = dict(
    backbone=dict(
        drop_path_rate=0.1, memory_cfg=dict(num_chunks=4, step_normalization=0.125, retrieve='final')))
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        layer_decay_rate=0.9,
        custom_keys={
            # Nothing in the global branch is trained yet. Longer keys go first, and M_0 must not decay.
            '.global_branch.': dict(lr_mult=5.0),
            '.global_branch.memory.w1': dict(lr_mult=5.0, decay_mult=0.0),
            '.global_branch.memory.w2': dict(lr_mult=5.0, decay_mult=0.0),
        }))
custom_hooks = [dict(type='EMAHook', momentum=1e-4)]
