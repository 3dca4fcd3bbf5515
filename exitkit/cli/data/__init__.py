"""Data sets as commands read them: images and texts by path or name, split, and as batches that fit a model."""
