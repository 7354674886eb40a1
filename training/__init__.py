"""A run around the method: what a step is, and all that keeps hours of steps from being lost."""
