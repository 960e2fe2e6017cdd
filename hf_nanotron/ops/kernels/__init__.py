"""Kernels: Triton, and those of attention libraries."""
