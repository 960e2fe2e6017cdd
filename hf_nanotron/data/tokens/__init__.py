"""Tokenized corpora: files of token ids, datasets of rows over them, and mixtures of datasets."""
