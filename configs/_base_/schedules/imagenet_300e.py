# AdamW, lr 4e-3 at 4096 images an update: 8 GPUs x 256 images x 2 accumulated iterations. GPUs that hold 512 images
# need no accumulation: --cfg-options optim_wrapper.accumulative_counts=1 train_dataloader.batch_size=512
# auto_scale_lr.base_batch_size=4096. Nothing in the model looks across images, so the halves add up to the whole.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    accumulative_counts=2,
    constructor='GroupingConstructor',
    paramwise_cfg=dict(
        # Norms, biases and the scales of GRN do not decay.
        flat_decay_mult=0.0,
        custom_keys={
            # Nor does M_0: it is the state every image starts from, no projection, and decay would only shrink it
            # towards the empty memory.
            '.memory.w1': dict(decay_mult=0.0),
            '.memory.w2': dict(decay_mult=0.0),
        }))

# 20 epochs from 1e-6 up to 4e-3 and 280 along a cosine back to 1e-6, set anew at every iteration. An iteration is a
# batch of the loader, whether or not the weights are updated after it: 626 an epoch with 8 GPUs, 313 updates.
max_epochs = 300
warmup_epochs = 20
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / 4e-3, by_epoch=True, begin=0, end=warmup_epochs,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=warmup_epochs, end=max_epochs,
         convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
# MMEngine compares GPUs x images of one iteration with this and knows nothing of the accumulation: 4096 / 2.
auto_scale_lr = dict(base_batch_size=2048)
