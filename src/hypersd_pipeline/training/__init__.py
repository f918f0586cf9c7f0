"""The training loop, its checkpoints and its figures. Knows optimisers, knows no objective's formula."""
