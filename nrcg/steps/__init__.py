"""The wing steps."""
