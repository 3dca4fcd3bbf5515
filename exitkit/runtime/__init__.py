"""The engine: samples really leave."""

from exitkit.runtime.engine import Engine, compile
from exitkit.runtime.loop import Prediction
from exitkit.runtime.timing import time_exits

__all__ = ["Engine", "Prediction", "compile", "time_exits"]
