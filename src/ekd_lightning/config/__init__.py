"""Configuration: from Hydra to settings and back."""
