"""Texts and conversations become files of tokens: sources, encoders, the writer, and who does which shard."""
