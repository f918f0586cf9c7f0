"""Functions without Kedro that build what is trained, train it, and hand back the result with its report."""
