"""The wing guidance."""
