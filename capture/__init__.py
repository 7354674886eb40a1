"""From a capture (photos or a video) to a COLMAP data set; convert.py is the command."""
