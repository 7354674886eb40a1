"""Other ways to learn a scene from photos, on the same Scene and scored alike: --method nerf|dvgo."""
