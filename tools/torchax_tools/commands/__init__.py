"""The commands of `torchax-ops`, one module for each group. They import torch when they run, not before."""
