"""Surgery: from a model to its boundaries and stages (capture → boundaries → placement → lower → verify)."""
