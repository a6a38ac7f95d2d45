"""CoTAM: a learned codec for images that multimodal LLMs read, and the store for its bitstreams."""
