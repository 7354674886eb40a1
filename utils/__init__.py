"""Pure functions that the rest of the project leans on, and the reports a run leaves behind."""
