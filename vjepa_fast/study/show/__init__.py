"""A page about one run and one's own videos: curves, masks, maps of the features, nearest clips."""
