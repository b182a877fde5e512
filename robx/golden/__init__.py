"""The golden sample of a bundle: a picture, the model's answer to it, and its answers to common mistakes."""
