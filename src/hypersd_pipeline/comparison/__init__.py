"""Which of several runs is better, and what differed between them. Knows no Kedro and no MLflow."""
