"""The parts of `hf-nanotron check`: a smaller model, layouts, processes, what a rank records, what differs."""
