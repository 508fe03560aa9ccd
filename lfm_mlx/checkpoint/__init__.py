"""Bytes ⇄ parameters: folders, the hub, weights under every spelling, quantization, writing."""
