_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

# SGD, lr 0.02 for 4 GPUs x 2 images, 500 linear warm-up iterations, x0.1 at epochs 8 and 11.
auto_scale_lr = dict(base_batch_size=8)
