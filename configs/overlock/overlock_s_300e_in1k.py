_base_ = './overlock_t_300e_in1k.py'

model = dict(backbone=dict(arch='s', drop_path_rate=0.4), head=dict(in_channels=640, overview_channels=512))
