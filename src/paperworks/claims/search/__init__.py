"""Claims of the search family."""
