"""The study runner: variants, suites, cells."""
