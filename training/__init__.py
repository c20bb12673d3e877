"""What the training commands share: options, the loop, checkpoints, processes, the token cache, speed."""
