"""The engine: samples really leave."""

from exitkit.engine.engine import Engine, compile
from exitkit.engine.loop import Prediction
from exitkit.engine.timing import time_exits

__all__ = ["Engine", "Prediction", "compile", "time_exits"]
