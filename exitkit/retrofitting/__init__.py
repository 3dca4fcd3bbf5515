"""Retrofitting: one call from a pretrained model and data to exits with a guarantee, or an honest no."""

from exitkit.retrofitting.alternatives import Alternative
from exitkit.retrofitting.result import Candidate, Retrofit
from exitkit.retrofitting.running import retrofit
from exitkit.retrofitting.verdict import Times

__all__ = ["Alternative", "Candidate", "Retrofit", "Times", "retrofit"]
