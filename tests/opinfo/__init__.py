"""PyTorch's own specification of its operators (OpInfo), driven on device jax and on CPU, form by form, dtype by dtype.

`run` is the engine and a command line for triage; `known` is the one list of known differences.
"""
