"""Artifacts on disk: atomic files and folders, locks, hashes, dataclasses as JSON, and the ONNX safety check."""
