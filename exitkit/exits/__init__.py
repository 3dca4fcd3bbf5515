"""Exits: heads, links and combiners, each usable on its own."""

from exitkit.exits.combiners import AdditiveEnsemble, GeometricEnsemble, MeanEnsemble
from exitkit.exits.heads import HeadOutput, InternalClassifier
from exitkit.exits.links import CascadeLink
from exitkit.exits.past_future import PastFuture, PastFutureClassifier
from exitkit.exits.pooling import SDNPool, TokenPool

__all__ = [
    "AdditiveEnsemble",
    "CascadeLink",
    "GeometricEnsemble",
    "HeadOutput",
    "InternalClassifier",
    "MeanEnsemble",
    "PastFuture",
    "PastFutureClassifier",
    "SDNPool",
    "TokenPool",
]
