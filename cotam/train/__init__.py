"""Training loops for the packaged models; plain torch."""
