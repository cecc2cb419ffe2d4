"""PyTorch's own specification of its operators (OpInfo) on device jax against CPU: a command line over `torchax.testing`.

`run` is the command line for triage; `known` is the one list of known differences.
"""
