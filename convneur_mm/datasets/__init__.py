from .shapes import SHAPE_CLASSES
from .shapes_formats import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet

__all__ = ['SHAPE_CLASSES', 'make_shapes_ade20k', 'make_shapes_coco', 'make_shapes_imagenet']
