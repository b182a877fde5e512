"""How close an exported model is to its fp32 student: similarity, agreement, and a non-inferiority test."""
