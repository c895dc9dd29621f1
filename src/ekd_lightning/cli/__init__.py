"""One small file per command; configuration is read here and nowhere below."""
