"""The engine: samples really leave."""

from exitkit.runtime.engine import Engine, compile
from exitkit.runtime.loop import Prediction

__all__ = ["Engine", "Prediction", "compile"]
