"""Where a vision encoder looks: importance maps that steer the codec."""
