"""A run: from settings to a finished run, and back."""
