"""The folder of a checkpoint, and the folder of a run."""
