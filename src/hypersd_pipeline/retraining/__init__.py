"""Retraining on a schedule: whether data changed, a challenger, the gate that it has to pass. Knows no Kedro and no MLflow."""
