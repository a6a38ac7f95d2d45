"""Questions about images, and how answers to them are scored."""
