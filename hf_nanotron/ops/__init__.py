"""Operators over plain tensors, on any device. They import nothing but `kernels`, and know nothing of distribution."""
