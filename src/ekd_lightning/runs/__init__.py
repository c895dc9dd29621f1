"""One run on disk: its directory, its result, its protocol."""
