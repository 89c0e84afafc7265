"""Claims about less work per step."""
