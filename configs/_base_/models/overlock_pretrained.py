# ImageNet-1K weights of each backbone: the path or URL of a classification checkpoint. These are the authors'; None
# trains from random weights, with a warning. A child config or --cfg-options may set it too, as in
# pretrained = dict(t='weights.pth') and pretrained.t=weights.pth.
pretrained = {
    arch: f'https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_{arch}_in1k_224.pth'
    for arch in ('xt', 't', 's', 'b')
}
