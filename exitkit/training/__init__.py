"""Training: regimes, the trainer, and the ensemble's fit."""

from exitkit.training.ensemble import fit_ensemble
from exitkit.training.progress import Epoch
from exitkit.training.trainer import Trainer

__all__ = ["Epoch", "Trainer", "fit_ensemble"]
