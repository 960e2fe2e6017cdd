"""One optimizer step, from the window of batches to reduced gradients."""
