"""Spectral parametrization: initial weights and learning rates that carry over from a small model to a wide one."""
