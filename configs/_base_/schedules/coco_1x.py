_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

# SGD, lr 0.02 for 4 GPUs x 2 images, 500 linear warm-up iterations, x0.1 at epochs 8 and 11. Norms and biases
# decay too, as in all of mmdet's 1x schedules.
optim_wrapper = dict(
    constructor='GroupingConstructor',
    paramwise_cfg=dict(
        custom_keys={
            # M_0 does not: it is the state every image starts from, no projection, and decay would only shrink it
            # towards the empty memory.
            '.memory.w1': dict(decay_mult=0.0),
            '.memory.w2': dict(decay_mult=0.0),
        }))
auto_scale_lr = dict(base_batch_size=8)
