"""Training: regimes, losses, the trainer, and the ensemble's fit."""

from exitkit.training.ensemble import EnsembleFit, fit_ensemble
from exitkit.training.losses import Distillation, Loss
from exitkit.training.progress import Epoch
from exitkit.training.regimes import Phase
from exitkit.training.trainer import Trainer

__all__ = ["Distillation", "EnsembleFit", "Epoch", "Loss", "Phase", "Trainer", "fit_ensemble"]
