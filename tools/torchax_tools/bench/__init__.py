"""The benchmark: measures torchax against plain JAX and torch on CPU, and reports ratios. Run it as a module."""
