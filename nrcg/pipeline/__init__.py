"""The wing pipeline."""
