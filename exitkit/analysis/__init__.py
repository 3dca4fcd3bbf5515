"""Analysis: what training does to a multi-exit model, in five measurements (Kubaty et al., section 3)."""

from exitkit.analysis.dominance import GradientDominance, gradient_dominance
from exitkit.analysis.information import Information, mutual_information
from exitkit.analysis.rank import Rank, numerical_rank

__all__ = [
    "GradientDominance",
    "Information",
    "Rank",
    "gradient_dominance",
    "mutual_information",
    "numerical_rank",
]
