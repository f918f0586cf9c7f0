"""What a run needs before it starts: memory, hours and disk, from the real code on tensors without memory."""
