"""Torch: which way a tensor goes, the run and its gradient, seeds, arguments, traced code, CUDA and device arrays."""
