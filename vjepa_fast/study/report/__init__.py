"""The report of a study: its tables, sentences and pictures, in four forms."""
