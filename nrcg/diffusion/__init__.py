"""The wing diffusion."""
