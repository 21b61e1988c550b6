"""Checks of a data set before training: that every file is there and decodes, and that the annotations fit.

A fault is something that stops a run, perhaps hours later, or lets it learn from wrong data without a word. A function
for each layout, :func:`check_coco`, :func:`check_ade20k` and :func:`check_imagenet`, finds all of them at once.
"""
from .coco import check_coco
from .folders import check_ade20k, check_imagenet
from .report import ClassCount, Fault, Report

__all__ = ['ClassCount', 'Fault', 'Report', 'check_ade20k', 'check_coco', 'check_imagenet']
