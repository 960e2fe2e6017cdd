"""Mixtures of experts: routers, balance, losses."""
