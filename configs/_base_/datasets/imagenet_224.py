# This base of mmpretrain's is the DeiT recipe at 224 x 224: RandAugment m9-mstd0.5-inc1, Random Erasing 0.25, bicubic.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

# 8 GPUs x 256 images x 2 accumulated iterations (imagenet_300e.py) = 4096.
train_dataloader = dict(batch_size=256, num_workers=8, persistent_workers=True)
val_dataloader = dict(batch_size=256, num_workers=8, persistent_workers=True)
test_dataloader = val_dataloader
