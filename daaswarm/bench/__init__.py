"""What ``daaswarm bench`` runs."""
