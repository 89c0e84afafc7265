"""Finding objects."""
