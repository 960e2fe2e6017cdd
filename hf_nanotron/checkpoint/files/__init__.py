"""Names and formats of single files."""
