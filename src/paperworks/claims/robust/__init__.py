"""Claims about noisy, few or biased labels."""
