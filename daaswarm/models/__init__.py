"""Where weights come from and how a checkpoint splits."""
