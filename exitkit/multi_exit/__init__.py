"""The multi-exit model: a backbone and the exits on it, how it is attached, what it costs, how it is saved."""
