"""Claims of the detection family."""
