"""Whole evaluations of a checkpoint beside their controls, as the commands run them."""
