"""Finding and predicting networks."""
