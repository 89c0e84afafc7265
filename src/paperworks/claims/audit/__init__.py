"""Claims of the audit family."""
