"""What can be done with checkpoint files without running a model."""
