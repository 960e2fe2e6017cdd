"""GPU kernels: Triton, and those of attention libraries. They import nothing of the package, not even `ops`."""
