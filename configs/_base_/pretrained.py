# ImageNet-1K weights of each backbone: the path or URL of a classification checkpoint, used by every COCO and ADE20K
# config. None trains from random weights, with a warning.
pretrained = dict(m1=None, m2=None, m3=None, m4=None)
