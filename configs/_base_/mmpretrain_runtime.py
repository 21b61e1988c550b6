_base_ = 'mmpretrain::_base_/default_runtime.py'

# Three hundred epochs would leave as many checkpoints.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='accuracy/top1'))
# Averaged weights are off; this line turns them on: custom_hooks = [dict(type='EMAHook', momentum=1e-4)]
