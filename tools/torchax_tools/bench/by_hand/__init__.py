"""Models written by hand in JAX, as functions of weights that are named as in the PyTorch module."""
