"""Teachers: what each says of a view of an image."""
