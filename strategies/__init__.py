"""Where Gaussians come and go while training: one file for each strategy."""
