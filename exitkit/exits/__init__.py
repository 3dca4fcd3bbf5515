"""Exits: heads, links and combiners, each usable on its own."""

from exitkit.exits.classifiers import HeadOutput, InternalClassifier
from exitkit.exits.convolution import conv, msdnet, separable, strided
from exitkit.exits.ensembles import AdditiveEnsemble, GeometricEnsemble, MeanEnsemble
from exitkit.exits.feature import Feature
from exitkit.exits.gpf import PastFuture, PastFutureClassifier
from exitkit.exits.links import CascadeLink
from exitkit.exits.pooling import SDNPool, TokenPool
from exitkit.exits.standardised import StandardisedLinear

__all__ = [
    "AdditiveEnsemble",
    "CascadeLink",
    "Feature",
    "GeometricEnsemble",
    "HeadOutput",
    "InternalClassifier",
    "MeanEnsemble",
    "PastFuture",
    "PastFutureClassifier",
    "SDNPool",
    "StandardisedLinear",
    "TokenPool",
    "conv",
    "msdnet",
    "separable",
    "strided",
]
