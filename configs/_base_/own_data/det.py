# What tools/train_custom.py starts from for instance masks: the light RTMDet-Ins, with the learning rate and the
# augmentation of pictures that are few.
_base_ = '../../rtmdet/rtmdet-ins_convneur_m1_shapes.py'

auto_scale_lr = dict(base_batch_size=4)
