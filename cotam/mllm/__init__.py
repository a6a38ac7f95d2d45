"""Multimodal LLMs behind one small interface."""
