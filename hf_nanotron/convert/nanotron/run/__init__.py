"""huggingface/nanotron's configuration of a run -> the YAML file of `hf-nanotron train`."""
