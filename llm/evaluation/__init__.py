"""How good a model is, and whether the figure can be trusted."""
