"""Healing: fine-tuning a student's weights, without labels, until int8 gives the embeddings that float gives."""
