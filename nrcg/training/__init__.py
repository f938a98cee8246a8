"""The wing training."""
