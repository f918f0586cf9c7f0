"""Evaluation of teachers and of few-step models on one set of prompts, noise and references. Knows no Kedro."""
