"""The engine: samples really leave."""

from exitkit.engine.compiling import compile
from exitkit.engine.engine import Engine
from exitkit.engine.loop import Prediction
from exitkit.engine.timing import time_exits

__all__ = ["Engine", "Prediction", "compile", "time_exits"]
