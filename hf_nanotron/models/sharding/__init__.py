"""How a stock model becomes this rank's part of it."""
