"""Reading frames out of files."""
