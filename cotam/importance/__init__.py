"""Where a vision encoder looks: importance maps that steer the codec."""

DEFAULT_CLIP = "ViT-L-14-336:openai"
DEFAULT_LAYER = 3
DEFAULT_STRENGTH = 2.0
