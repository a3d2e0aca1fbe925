"""The published results and the claims about them, computed again."""
