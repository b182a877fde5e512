"""Artifacts on disk: atomic files and folders, locks, hashes, JSON of dataclasses, and the ONNX safety check."""
