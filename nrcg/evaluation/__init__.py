"""The wing evaluation."""
