"""A contact sheet of a data set: clips and masks as training gets them, as a page or a picture."""
