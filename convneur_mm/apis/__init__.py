"""Python interface to trained models: :func:`init_model` builds one, :func:`inference` predicts."""
from .model import init_model
from .predict import ImageError, Prediction, inference, iter_inference

__all__ = ['ImageError', 'Prediction', 'inference', 'init_model', 'iter_inference']
