"""The training loop, its checkpoints and its metrics. Knows optimisers, knows no objective's formula."""
