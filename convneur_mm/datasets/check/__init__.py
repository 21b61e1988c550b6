"""Checks of a data set before training: whether every file exists and decodes, and whether the annotations fit.

A fault stops a run, perhaps hours later, or lets it silently learn from wrong data. There is one function for each
layout, :func:`check_coco`, :func:`check_ade20k` and :func:`check_imagenet`, which finds all faults in one pass.
"""
from .coco import check_coco
from .folders import check_ade20k, check_imagenet
from .report import ClassCount, Fault, Report

__all__ = ['ClassCount', 'Fault', 'Report', 'check_ade20k', 'check_coco', 'check_imagenet']
