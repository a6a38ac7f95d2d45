"""The networks: transforms, gains, entropy model, integer-exact layers."""
