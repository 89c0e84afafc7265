"""Published machine-learning methods that work: import them, check their claims, combine and scale them."""

__version__ = "0.1.0"
