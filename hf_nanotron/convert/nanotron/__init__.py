"""Checkpoints of huggingface/nanotron."""
