"""What is measured: losses, distances between sets of images, copies, class mixes."""

from personae.evaluate.copying import copy_ratio, nearest_distance
from personae.evaluate.distances import Kid, frechet, kid, precision_recall
from personae.evaluate.features import FEATURES, Features, features_by_name
from personae.evaluate.histogram import class_histogram, histogram_distance
from personae.evaluate.loss import denoising_loss

__all__ = [
    "FEATURES",
    "Features",
    "Kid",
    "class_histogram",
    "copy_ratio",
    "denoising_loss",
    "features_by_name",
    "frechet",
    "histogram_distance",
    "kid",
    "nearest_distance",
    "precision_recall",
]
