"""One file per export format; `write.py` holds the match that selects it."""
