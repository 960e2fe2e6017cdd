"""ZeRO: sharded weights, gradients and optimizer states."""
