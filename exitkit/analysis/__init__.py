"""Analysis: what training does to a multi-exit model, in five measurements (Kubaty et al., section 3)."""

from exitkit.analysis.dominance import GradientDominance, gradient_dominance
from exitkit.analysis.information import Information, mutual_information
from exitkit.analysis.path_results import Connectivity, Plane
from exitkit.analysis.paths import connectivity, plane
from exitkit.analysis.permutations.matching import align
from exitkit.analysis.rank import Rank, numerical_rank
from exitkit.analysis.surface import Landscape, landscape

__all__ = [
    "Connectivity",
    "GradientDominance",
    "Information",
    "Landscape",
    "Plane",
    "Rank",
    "align",
    "connectivity",
    "gradient_dominance",
    "landscape",
    "mutual_information",
    "numerical_rank",
    "plane",
]
