"""What the ranks of a run agree on: flags, windows of data, values."""
