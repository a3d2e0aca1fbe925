"""The published results and the claims about them, computed again; and from one's own study."""
