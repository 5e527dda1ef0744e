"""Package data: models and images of the embedded zoo."""
