# ImageNet-1K weights of each backbone: the path or URL of a classification checkpoint, used by every COCO and ADE20K
# config. None trains from random weights, with a warning. A child config or --cfg-options may set it too, as in
# pretrained = dict(m3='weights.pth') and pretrained.m3=weights.pth.
pretrained = dict(m1=None, m2=None, m3=None, m4=None)
