"""Loggers and panels: where curves go."""
