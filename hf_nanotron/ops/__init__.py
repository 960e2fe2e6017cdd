"""GPU kernels over plain tensors. They know nothing of distribution."""
