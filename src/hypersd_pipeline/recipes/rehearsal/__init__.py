"""A full-size rehearsal: every stage for two updates, on random weights of the real architectures, at a small resolution."""
