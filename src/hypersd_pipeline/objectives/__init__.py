"""Distillation objectives: functions of tensors and callables. No optimiser, no state, no logging."""
