"""Beyond one process: requests of many clients, and data sets larger than a machine. Needs the extra ``exitkit[serve]``."""

from exitkit.serving.dataset import predict, shift
from exitkit.serving.scheduling import RequestScheduler, StageError, UnavailableError

__all__ = ["RequestScheduler", "StageError", "UnavailableError", "predict", "shift"]
