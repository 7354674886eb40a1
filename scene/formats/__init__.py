"""Files of splats."""
