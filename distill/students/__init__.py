"""The student network: a timm trunk and the projection head it is trained with."""
