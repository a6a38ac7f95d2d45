"""The entropy coder: rANS, integer CDF tables, quality maps."""
