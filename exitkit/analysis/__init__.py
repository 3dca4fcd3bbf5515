"""Analysis: what training does to a multi-exit model, in five measurements (Kubaty et al., section 3)."""

from exitkit.analysis.dominance import GradientDominance, gradient_dominance
from exitkit.analysis.information import Information, mutual_information
from exitkit.analysis.rank import Rank, numerical_rank
from exitkit.analysis.surface import Landscape, landscape

__all__ = [
    "GradientDominance",
    "Information",
    "Landscape",
    "Rank",
    "gradient_dominance",
    "landscape",
    "mutual_information",
    "numerical_rank",
]
