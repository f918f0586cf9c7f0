"""Comparisons of methods, parts and seeds: chains of stages that run outside the main job, with a record each. Knows no Kedro."""
