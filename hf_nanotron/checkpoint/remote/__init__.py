"""Checkpoints in remote stores."""
