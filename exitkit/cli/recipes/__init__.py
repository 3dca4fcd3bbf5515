"""Recipes: what they may say, and how they are carried out, here or on a Ray cluster, once or with several seeds."""
