"""The runs of a study: variants, suites, the plan, running it, and the cells that come out."""
