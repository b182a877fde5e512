"""The input of one training step: crops, masks and loading, each a pure function of (seed, epoch, image index)."""
