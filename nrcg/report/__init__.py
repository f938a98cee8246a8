"""The wing report."""
