"""Exits: heads, links and combiners, each usable on its own."""

from exitkit.exits.combiners import AdditiveEnsemble, GeometricEnsemble
from exitkit.exits.heads import InternalClassifier
from exitkit.exits.links import CascadeLink
from exitkit.exits.pooling import SDNPool, TokenPool

__all__ = ["AdditiveEnsemble", "CascadeLink", "GeometricEnsemble", "InternalClassifier", "SDNPool", "TokenPool"]
