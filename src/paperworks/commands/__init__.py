"""The commands of methods that are tools; each imports its method only when it runs."""
