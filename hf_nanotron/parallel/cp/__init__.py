"""Context parallelism: the tokens of a row are sharded, and attention gathers keys and values."""
