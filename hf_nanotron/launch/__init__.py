"""A training run becomes a job of a cluster: its files, written from templates, and what submits them."""
