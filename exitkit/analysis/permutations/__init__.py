"""Permutations of a model's hidden units that leave its function alone: derived from its graph, verified, and matched."""
