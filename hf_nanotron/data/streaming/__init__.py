"""Rows of tokens out of streams of documents, in an order and with a state that no topology changes."""
