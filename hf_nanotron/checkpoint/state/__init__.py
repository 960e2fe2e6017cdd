"""The training state: masters, moments, values, buffers."""
