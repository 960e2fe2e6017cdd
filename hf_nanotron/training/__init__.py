"""The run around the model: what a step, an epoch and a run are made of."""
