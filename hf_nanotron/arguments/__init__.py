"""What the training arguments mean, which are honoured and which are refused."""
