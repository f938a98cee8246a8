"""The wing classifiers."""
