_base_ = '../convneur_m3_300e_in1k.py'

model = dict(backbone=dict(memory_cfg=dict(mem_channels=256)))
