"""Small programs beside the trainer."""
