"""The engine: samples really leave."""

from exitkit.runtime.engine import Engine, Prediction, compile

__all__ = ["Engine", "Prediction", "compile"]
