"""Conversions between checkpoint formats."""
